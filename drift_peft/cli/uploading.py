"""What `prior push` and `keep push` have in common."""

from __future__ import annotations

from typing import Any

from .parser import Parser


def upload_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("repository", metavar="REPOSITORY", help="hub id, such as user/repository; made if it does not exist")
    add("--private", action="store_true", help="make the repository a private one")
    add("--revision", help="branch to upload to (default: the repository's main one)")
    add("--message", help="of the commit")
    parser.add_json()


def upload(file: Any, repository: str, private: bool, revision: str | None, message: str | None, as_json: bool) -> None:
    """Push a prior or a keep set, and say how it is loaded from there."""
    from ..checkpoints import at_revision
    from .show import facts, show

    url = file.push_to_hub(repository, private=private or None, commit_message=message, revision=revision)
    name = at_revision(repository, revision)
    rows = {"commit": url, "load with": f'{type(file).__name__}.load("{name}")'}
    result = {"repository": repository, "revision": revision, "commit": url, "sha256": file.sha256}
    show(result, as_json, facts(f"{file.source} uploaded", rows))
