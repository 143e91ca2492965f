"""drift-peft prior combine: weighted sum of priors."""

from __future__ import annotations

from .parser import Parser, file_such_as

HELP = "weighted sum of priors"
DESCRIPTION = "Write a weighted sum of priors of one base as a new prior."
EXAMPLE = "drift-peft prior combine a.safetensors=0.7 b.safetensors=0.3 -o c.safetensors"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "parts",
        nargs="+",
        metavar="PRIOR=COEFFICIENT",
        help="a prior and its coefficient, such as a.safetensors=0.7 user/prior@v1=0.3",
    )
    add("-o", "--output", required=True, type=file_such_as("prior.safetensors"), help="file to write")
    add("--rank", type=int, help="largest rank per weight (default: the largest in these priors)")
    add("--overwrite", action="store_true", help="replace an existing output")
    parser.add_json()


def run(parts: list[str], output: str, rank: int | None, overwrite: bool, as_json: bool) -> None:
    sum_of = [_part(part) for part in parts]
    from ..prior import ReasoningPrior
    from ..prior.report import prior_summary, prior_table
    from .show import show

    summary = prior_summary(ReasoningPrior.combine(sum_of, output, rank, overwrite))
    show(summary, as_json, prior_table(summary))


def _part(text: str) -> tuple[str, float]:
    """a.safetensors=0.7 -> the prior and its coefficient."""
    source, _, coefficient = text.rpartition("=")
    try:
        if source:
            return source, float(coefficient)
    except ValueError:
        pass
    raise ValueError(f"{text} names no coefficient: write prior=coefficient, such as a.safetensors=0.7")
