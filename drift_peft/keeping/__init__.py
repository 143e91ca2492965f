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
steps      what a hook of torch.optim has to know
train      what keeps a model near the answers while it trains
trainer    the same in Trainer's logs
keep       keep: all of this, in any loop
"""

from .answers import Sample
from .file import KeepSet
from .keep import keep
from .make import make_keep_set
from .measure import Distance, measure, summarize
from .page import write_page
from .steps import enclosing_steps, once_gradients_are_there, trained_by
from .summary import keep_summary, keep_table
from .train import keeping_of
from .trainer import give_to_trainers

__all__ = [
    "Distance",
    "KeepSet",
    "Sample",
    "enclosing_steps",
    "give_to_trainers",
    "keep",
    "keep_summary",
    "keep_table",
    "keeping_of",
    "make_keep_set",
    "measure",
    "once_gradients_are_there",
    "summarize",
    "trained_by",
    "write_page",
]
