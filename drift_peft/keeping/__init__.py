"""The VLM's own answers to unlabelled images, in a file, and how far a model has gone from them.

answers    questions and answers as a model's inputs, and what it says of each answer token
distance   KL divergence from the VLM, of which the k largest probabilities are known
file       the file of a keep set, read and written
share      its card on the hub
questions  what is asked: the built-in questions.txt, or a file of the user's own
pictures   the images that are asked about: of a folder, a data set, training data
vlm        the VLM that answers in this process
server     the VLM that answers behind a server of OpenAI's protocol
make       a VLM and unlabelled images -> keep set, resumable
summary    a keep set in numbers and as tables
page       its contact sheet; page.html is the template
"""

from .answers import Sample
from .file import KeepSet
from .make import make_keep_set
from .page import write_page
from .summary import keep_summary, keep_table

__all__ = ["KeepSet", "Sample", "keep_summary", "keep_table", "make_keep_set", "write_page"]
