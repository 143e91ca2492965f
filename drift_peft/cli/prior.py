"""drift-peft prior: the verbs of priors."""

from . import prior_build, prior_combine, prior_export, prior_gate, prior_inspect, prior_push, prior_truncate
from .parser import Parser

HELP = "build, inspect, combine, gate and share priors"
DESCRIPTION = "Build, inspect, combine, gate and share reasoning priors."
EXAMPLE = "drift-peft prior inspect prior.safetensors"

VERBS = {
    "build": prior_build,
    "inspect": prior_inspect,
    "combine": prior_combine,
    "truncate": prior_truncate,
    "gate": prior_gate,
    "export": prior_export,
    "push": prior_push,
}


def flags(parser: Parser) -> None:
    parser.add_verbs(VERBS)
