"""drift-peft prior push: upload to the hub, with a model card."""

from __future__ import annotations

from .parser import Parser
from .uploading import upload, upload_flags

HELP = "upload to the hub, with a model card"
DESCRIPTION = "Upload a prior with a model card to a hub repository."
EXAMPLE = "drift-peft prior push prior.safetensors user/repository --private"


def flags(parser: Parser) -> None:
    parser.add_argument("prior", metavar="PRIOR", help="prior file")
    upload_flags(parser)


def run(prior: str, **settings) -> None:
    from ..prior import ReasoningPrior

    upload(ReasoningPrior.load(prior), **settings)
