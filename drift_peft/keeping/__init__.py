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
measure    how far a model has gone from each answer
steps      around every optimizer step: what keeps, then what guides
feed       batches of a keep set in their order, read while the model trains
kept       a model that is kept: what is added to its gradients
trainer    its distance from the VLM in Trainer's logs
four_bit   bitsandbytes on a CPU
train      keep: a model that trains stays near the VLM
"""

from .answers import Sample
from .file import KeepSet
from .four_bit import keep_4bit_differentiable
from .kept import is_kept, keep_telemetry
from .make import make_keep_set
from .measure import Distance, measure, summarize
from .page import write_page
from .steps import Act, act_in_steps
from .summary import keep_summary, keep_table
from .train import keep
from .trainer import KeepCallback, add_to_trainers
from .vlm import Vlm

__all__ = [
    "Act",
    "Distance",
    "KeepCallback",
    "KeepSet",
    "Sample",
    "Vlm",
    "act_in_steps",
    "add_to_trainers",
    "is_kept",
    "keep",
    "keep_4bit_differentiable",
    "keep_summary",
    "keep_table",
    "keep_telemetry",
    "make_keep_set",
    "measure",
    "summarize",
    "write_page",
]
