"""Images and conversations, from the hub or from files, as TRL takes them; what cannot be used is dropped and counted.

    python recipes/data.py ChaoHuangCS/DRIFT-TL-Distill-4K -o train.parquet
    python recipes/data.py chains.jsonl --images pictures --boxed -o train.parquet
    python recipes/data.py chains.jsonl --model BASE --processor-kwargs '{"max_pixels": 262144}' -o train.parquet

The published set of the paper (arXiv 2510.15050: about 4,000 verified chains of thought) has, by its card and by the
reference code, `messages` with role and content, and `images`, which are paths; code that reads it takes them to start
outside of the set (../DRIFT-TL-Distill-4K/…). Its rows could not be looked at here, so what a sample holds is read off
its own keys (parts/layouts.py), and the table says which layout was found. What the columns of the result are is said
in parts/loading.py.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("data.py")

import json
from pathlib import Path

from parts.command_line import Parser, in_one_sentence, run_script
from parts.layouts import LAYOUTS
from parts.lengths import within_length
from parts.loading import PLACE, Dropped, load_messages, nothing_left
from parts.parquet import refuse_output, write_parquet
from parts.processing import check_chat_template, load_processor, processor_settings
from parts.trained import special_tokens
from rich.console import Console
from rich.table import Table


def counts_table(title: str, kept: int, dropped: Dropped) -> Table:
    """What was kept and dropped, with the first sample of each reason."""
    table = Table("samples", "number", "the first", title=title)
    table.add_row("kept", str(kept), "; ".join(sorted(dropped.layouts)))
    for what, count, first in dropped.rows():
        table.add_row(what, str(count), first)
    for limit, length in dropped.quantiles().items():
        table.add_row(f"tokens, {limit}", str(length), "")
    for key, text in dropped.unread.items():
        table.add_row("not read", "", f"{key}: {text}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("data.py", __doc__)
    parser.epilog += f"\n\nlayouts, by example:\n{LAYOUTS}"
    parser.add_argument("source", help="hub id, id@revision, .json, .jsonl or .parquet file, or a folder of these")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, such as train.parquet")
    parser.add_argument("--split", default="train", help="split of a hub id or a folder")
    parser.add_argument("--images", type=Path, help="folder that relative image paths start from, if not the source's")
    parser.add_argument("--boxed", action="store_true", help=r"drop answers without a \boxed{…}")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    on_bad = "drop samples that cannot be used, or fail at the first"
    parser.add_argument("--on-bad", choices=["drop", "fail"], default="drop", help=on_bad)
    parser.add_argument("--model", metavar="BASE", help="count tokens as this base does, and drop longer samples")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="with --model: longest sample, its images included"
    )
    parser.add_processor_kwargs()
    parser.add_argument("--chat-template-path", metavar="FILE", help="the .jinja file that you train with, if you do")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = parser.parse_args(arguments)
    parser.refuse_out_of_range(args, 1, "--max-tokens")
    options = vars(args)
    if options["model"] is None:
        parser.refuse_idle("without the base whose tokens are counted", "--max-tokens", lacks="it with --model")
    output, as_json, overwrite = (options.pop(name) for name in ("output", "json", "overwrite"))
    model, max_tokens = options.pop("model"), options.pop("max_tokens")
    processor_kwargs, template, trusted = map(options.pop, ("processor", "chat_template_path", "trust_remote_code"))
    if model is None and (processor_kwargs or template or trusted):
        parser.error("settings of the processor are for counting tokens as a base does: name that base with --model")
    with in_one_sentence("data.py", ValueError, OSError, ImportError):
        refuse_output(output, overwrite)
        if model is not None:
            check_chat_template(template)
            from drift_peft.checkpoints import split_revision

            settings = processor_settings(processor_kwargs, template)
            named = (model, None) if Path(model).exists() else split_revision(model)
            processor = load_processor(*named, settings, trusted)
            options["special"] = special_tokens(processor)
        dataset, dropped = load_messages(**options, places=model is not None)
        if model is not None:
            limits = {"source": options["source"], "on_long": options["on_bad"], "dropped": dropped}
            dataset = within_length(dataset, processor, max_tokens, **limits)
            dataset = dataset.remove_columns(PLACE)
        kept = write_parquet(dataset, output)
        if not kept:
            raise nothing_left(options["source"], dropped)
    if as_json:
        print(json.dumps({"source": options["source"], "output": str(output), "kept": kept, **dropped.report()}))
    else:
        Console(markup=False).print(counts_table(f"{options['source']} -> {output}", kept, dropped))


if __name__ == "__main__":
    run_script("data.py", main)
