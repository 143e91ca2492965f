"""The VLM's own answers to unlabelled images, in a file, and how far a model has gone from them; an expert's to text.

answers     questions and answers as a model's inputs, and what it says of each answer token
distance    KL divergence from the VLM, of which the k largest probabilities are known
sample_file  a file of answers, read and written: what a keep set and an answer set have in common
header      the form of their headers
file        the file of a keep set
share       its card on the hub
questions   what is asked: the built-in questions.txt, or a file of the user's own
pictures    the images that are asked about: of a folder, a data set, training data
generation  a model that answers: loaded, and asked for what it finds likeliest
vlm         the VLM that answers in this process
server      the VLM that answers behind a server of OpenAI's protocol
make        a VLM and unlabelled images -> keep set, resumable
answer_set  the file of an expert's own answers to prompts in text
spelling    an expert's tokens in those of the VLM
expert      a text-only expert and prompts -> answer set, resumable
summary     a keep set in numbers and as tables
page        its contact sheet; page.html is the template
measure     how far a model has gone from each answer
registry    what acts on models in this process, from any thread
samples     the hard form: a keep set as ordinary training samples
steps       around every optimizer step: what keeps, then what guides
feed        batches of a keep set in their order, read while the model trains
undisturbed  a pass of keeping that the training does not notice
processes   several processes that train one model
kept        a model that is kept: what is added to its gradients
telemetry   what is told of it: numbers, words for its card, that it was not kept after all
trainer     its distance from the VLM in Trainer's logs
four_bit    bitsandbytes on a CPU
inner       the model inside DDP and torch.compile
train       keep: a model that trains stays near the VLM
"""

from .answers import Sample, as_templates_are_read, image_mode, think_prefix
from .distance import answer_rows, bucketed_kl, divergence
from .expert import make_answer_set
from .feed import Feed, Part
from .file import KeepSet, data_address, vocabulary_rows
from .four_bit import keep_4bit_differentiable
from .generation import evaluated, greedy_settings, refuse_offloaded, with_room
from .inner import inner_model
from .kept import GRADIENT_SCALE, is_kept, keepings_of
from .make import make_keep_set
from .measure import measure, summarize
from .page import write_page
from .pictures import Shown, check_source
from .questions import read_questions
from .registry import Known, Registry
from .samples import training_samples, write_samples
from .steps import Act, LeftGradient, act_in_steps
from .summary import keep_summary, keep_table
from .telemetry import keep_telemetry, keep_words, warn_of_lost_passes
from .train import keep
from .trainer import KeepCallback, add_to_logs, add_to_trainers
from .vlm import Vlm, check_processor_settings

__all__ = [
    "GRADIENT_SCALE",
    "Act",
    "Feed",
    "KeepCallback",
    "KeepSet",
    "Known",
    "LeftGradient",
    "Part",
    "Registry",
    "Sample",
    "Shown",
    "Vlm",
    "act_in_steps",
    "add_to_logs",
    "add_to_trainers",
    "answer_rows",
    "as_templates_are_read",
    "bucketed_kl",
    "check_processor_settings",
    "check_source",
    "data_address",
    "divergence",
    "evaluated",
    "greedy_settings",
    "image_mode",
    "inner_model",
    "is_kept",
    "keep",
    "keep_4bit_differentiable",
    "keep_summary",
    "keep_table",
    "keep_telemetry",
    "keep_words",
    "keepings_of",
    "make_answer_set",
    "make_keep_set",
    "measure",
    "read_questions",
    "refuse_offloaded",
    "summarize",
    "think_prefix",
    "training_samples",
    "vocabulary_rows",
    "warn_of_lost_passes",
    "with_room",
    "write_page",
    "write_samples",
]
