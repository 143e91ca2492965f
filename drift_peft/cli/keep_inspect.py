"""drift-peft keep inspect: what a keep set holds."""

from __future__ import annotations

from .parser import Parser, file_such_as

HELP = "what a keep set holds"
DESCRIPTION = "Show what a VLM was asked, how long its answers are and how sure it was."
EXAMPLE = "drift-peft keep inspect keep.safetensors --html keep.html"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("keep_set", metavar="KEEP_SET", help="keep set: file, hub id or id@revision")
    add(
        "--html",
        type=file_such_as("keep.html"),
        metavar="PAGE",
        help="also write a contact sheet: one page with pictures, questions and answers",
    )
    add("--overwrite", action="store_true", help="replace an existing page")
    parser.add_json()


def run(keep_set: str, html: str | None, overwrite: bool, as_json: bool) -> None:
    if overwrite and html is None:
        raise ValueError("--overwrite replaces a page: name it with --html, or leave --overwrite out")
    from ..keeping import KeepSet, keep_summary, keep_table, write_page
    from .show import show

    inspected = KeepSet.load(keep_set)
    if html is not None:
        write_page(inspected, html, overwrite)
    summary = keep_summary(inspected)
    show(summary, as_json, keep_table(summary))
