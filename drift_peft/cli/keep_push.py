"""drift-peft keep push: upload to the hub, with a card."""

from __future__ import annotations

from .parser import Parser
from .uploading import upload, upload_flags

HELP = "upload to the hub, with a card"
DESCRIPTION = "Upload a keep set, its images among it, with a card to a hub repository."
EXAMPLE = "drift-peft keep push keep.safetensors user/repository --private"


def flags(parser: Parser) -> None:
    parser.add_argument("keep_set", metavar="KEEP_SET", help="keep set")
    upload_flags(parser)


def run(keep_set: str, **settings) -> None:
    from ..keeping import KeepSet

    upload(KeepSet.load(keep_set), **settings)
