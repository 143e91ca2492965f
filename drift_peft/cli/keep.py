"""drift-peft keep: the verbs of keep sets."""

from . import keep_inspect, keep_make, keep_push
from .parser import Parser

HELP = "make, inspect and share keep sets"
DESCRIPTION = "Make, inspect and share keep sets: a VLM's own answers, from which training is kept from straying."
EXAMPLE = "drift-peft keep inspect keep.safetensors"

VERBS = {"make": keep_make, "inspect": keep_inspect, "push": keep_push}


def flags(parser: Parser) -> None:
    parser.add_verbs(VERBS)
