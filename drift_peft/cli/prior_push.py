"""drift-peft prior push: upload to the hub, with a model card."""

from __future__ import annotations

from .parser import Parser

HELP = "upload to the hub, with a model card"
DESCRIPTION = "Upload a prior with a model card to a hub repository."
EXAMPLE = "drift-peft prior push prior.safetensors user/repository --private"


def flags(parser: Parser) -> None:
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("prior", metavar="PRIOR", help="prior file")
    add("repository", metavar="REPOSITORY", help="hub id, such as user/repository; made if it does not exist")
    add("--private", action="store_true", help="make the repository a private one")
    add("--revision", help="branch to upload to (default: the repository's main one)")
    add("--message", help="of the commit")
    add("--json", dest="as_json", action="store_true", help="print the result as JSON")


def run(prior: str, repository: str, private: bool, revision: str | None, message: str | None, as_json: bool) -> None:
    from rich.table import Table

    from ..prior import ReasoningPrior
    from .show import show

    pushed = ReasoningPrior.load(prior)
    url = pushed.push_to_hub(repository, private=private or None, commit_message=message, revision=revision)
    name = "@".join(filter(None, (repository, revision)))
    table = Table(show_header=False, title=f"{prior} uploaded")
    table.add_row("commit", url)
    table.add_row("load with", f'ReasoningPrior.load("{name}")')
    show({"repository": repository, "commit": url, "sha256": pushed.sha256}, as_json, table)
