"""drift-peft prior inspect: what a prior holds."""

from __future__ import annotations

from .parser import Parser, file_such_as

HELP = "what a prior holds"
DESCRIPTION = "Show how far apart two models are, and how much of it a prior holds."
EXAMPLE = "drift-peft prior inspect prior.safetensors --html prior.html"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("prior", metavar="PRIOR", help="prior file, hub id or id@revision")
    add("--rank", type=int, help="captured energy when Δ is truncated to this rank, as an adapter's is")
    add(
        "--plot",
        type=file_such_as("prior.png"),
        metavar="FILE",
        help="also draw it into this file, such as prior.png; needs the extra report",
    )
    add(
        "--html",
        type=file_such_as("prior.html"),
        metavar="FILE",
        help="also write it as one self-contained page, such as prior.html",
    )
    add("--overwrite", action="store_true", help="replace existing files of --plot and --html")
    parser.add_json("print as JSON, with the numbers of every weight")


def run(prior: str, rank: int | None, plot: str | None, html: str | None, overwrite: bool, as_json: bool) -> None:
    if overwrite and plot is None and html is None:
        raise ValueError("--overwrite replaces files of --plot and --html: name one, or leave --overwrite out")
    from ..prior import ReasoningPrior
    from ..prior.report import prior_summary, prior_table, write_report
    from .show import show

    summary = prior_summary(ReasoningPrior.load(prior), rank)
    write_report(summary, plot, html, overwrite)
    words = "\n".join(summary["verdict"][key] for key in ("distance", "merging", "rank", "basis"))
    show(summary, as_json, prior_table(summary), words)
