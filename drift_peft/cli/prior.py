"""drift-peft prior: the verbs of priors."""

from . import prior_build, prior_combine, prior_export, prior_inspect, prior_push, prior_truncate
from .parser import Parser

HELP = "build, inspect, combine and share priors"
DESCRIPTION = "Build, inspect, combine and share reasoning priors."
EXAMPLE = "drift-peft prior inspect prior.safetensors"

VERBS = {
    "build": prior_build,
    "inspect": prior_inspect,
    "combine": prior_combine,
    "truncate": prior_truncate,
    "export": prior_export,
    "push": prior_push,
}


def flags(parser: Parser) -> None:
    parser.add_verbs(VERBS)
