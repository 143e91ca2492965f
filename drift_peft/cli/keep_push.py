"""drift-peft keep push: upload to the hub, with a card."""

from __future__ import annotations

from .parser import Parser

HELP = "upload to the hub, with a card"
DESCRIPTION = "Upload a keep set, its images among it, with a card to a hub repository."
EXAMPLE = "drift-peft keep push keep.safetensors user/repository --private"


def flags(parser: Parser) -> None:
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("keep_set", metavar="KEEP_SET", help="keep set")
    add("repository", metavar="REPOSITORY", help="hub id, such as user/repository; made if it does not exist")
    add("--private", action="store_true", help="make the repository a private one")
    add("--revision", help="branch to upload to (default: the repository's main one)")
    add("--message", help="of the commit")
    add("--json", dest="as_json", action="store_true", help="print the result as JSON")


def run(
    keep_set: str, repository: str, private: bool, revision: str | None, message: str | None, as_json: bool
) -> None:
    from rich.table import Table

    from ..keeping import KeepSet
    from .show import show

    pushed = KeepSet.load(keep_set)
    url = pushed.push_to_hub(repository, private=private or None, commit_message=message, revision=revision)
    name = "@".join(filter(None, (repository, revision)))
    table = Table(show_header=False, title=f"{keep_set} uploaded")
    table.add_row("commit", url)
    table.add_row("load with", f'KeepSet.load("{name}")')
    show({"repository": repository, "commit": url, "sha256": pushed.sha256}, as_json, table)
