"""drift-peft prior truncate: the same prior at a lower rank."""

from .parser import Parser, file_such_as

HELP = "the same prior at a lower rank"
DESCRIPTION = "Write a prior of lower rank."
EXAMPLE = "drift-peft prior truncate prior.safetensors --rank 16 -o small.safetensors"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("prior", metavar="PRIOR", help="prior file, hub id or id@revision")
    add("--rank", type=int, required=True, help="largest rank per weight")
    add("-o", "--output", required=True, type=file_such_as("prior.safetensors"), help="file to write")
    add("--overwrite", action="store_true", help="replace an existing output")
    parser.add_json()


def run(prior: str, rank: int, output: str, overwrite: bool, as_json: bool) -> None:
    from ..prior import ReasoningPrior
    from ..prior.report import prior_summary, prior_table
    from .show import show

    summary = prior_summary(ReasoningPrior.load(prior).truncate(rank, output, overwrite))
    show(summary, as_json, prior_table(summary))
