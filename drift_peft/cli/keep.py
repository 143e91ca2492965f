"""drift-peft keep: the verbs of keep sets."""

from . import keep_inspect, keep_make, keep_push, keep_samples
from .parser import Parser

HELP = "make, inspect, share and write out keep sets"
DESCRIPTION = """Make, inspect, share and write out keep sets: a VLM's own answers, from which training is kept from
straying."""
EXAMPLE = "drift-peft keep inspect keep.safetensors"

VERBS = {"make": keep_make, "inspect": keep_inspect, "push": keep_push, "samples": keep_samples}


def flags(parser: Parser) -> None:
    parser.add_verbs(VERBS)
