"""The VLM's own answers to unlabelled images, in a file, and how far a model has gone from them.

answers   questions and answers as a model's inputs, and what it says of each answer token
distance  KL divergence from the VLM, of which the k largest probabilities are known
file      the file of a keep set, read and written
share     its card on the hub
"""

from .answers import Sample
from .file import KeepSet

__all__ = ["KeepSet", "Sample"]
