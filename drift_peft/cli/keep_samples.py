"""drift-peft keep samples: a keep set as ordinary training samples."""

from __future__ import annotations

from .parser import Parser

HELP = "a keep set as ordinary training samples"
DESCRIPTION = """Write the VLM's answers as training samples in the messages layout, with their pictures beside them,
for trainers that keep() does not reach: mix about one of them with every four of your own."""
EXAMPLE = "drift-peft keep samples keep.safetensors -o keep_samples"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("keep_set", metavar="KEEP_SET", help="keep set: file, hub id or id@revision")
    add("-o", "--output", required=True, help="folder to write samples.jsonl into, or a file that ends in .jsonl")
    add("--overwrite", action="store_true", help="replace existing samples and their pictures")
    parser.add_json()


def run(keep_set: str, output: str, overwrite: bool, as_json: bool) -> None:
    from ..keeping import KeepSet, write_samples
    from .show import facts, show

    result = write_samples(KeepSet.load(keep_set), output, overwrite)
    left_out = {f"left out: {reason}": number for reason, number in result["left_out"].items()}
    rows = {"written": result["written"], **left_out, "pictures": result["pictures"]}
    show(result, as_json, facts(f"{keep_set} -> {result['samples']}", rows))
