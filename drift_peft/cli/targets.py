"""drift-peft targets: what would be adapted and steered."""

from __future__ import annotations

from .parser import Parser

HELP = "what would be adapted and steered"
DESCRIPTION = "Show what target_modules=None adapts and steers on a model, without loading it."
EXAMPLE = "drift-peft targets Qwen/Qwen2.5-VL-7B-Instruct --prior prior.safetensors"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, hub id or id@revision")
    add("--prior", help="adapt and steer what has a Δ in this prior")
    parser.add_json()


def run(model: str, prior: str | None, as_json: bool) -> None:
    from rich.table import Table

    from ..checkpoints import Checkpoint, is_same_origin, named
    from ..prior import ReasoningPrior, read_merge
    from ..tuner import targets_summary
    from ..warn import warn
    from .show import show

    loaded = None if prior is None else ReasoningPrior.load(prior)
    checkpoint = Checkpoint(model)
    summary = targets_summary(checkpoint, loaded)
    built = None if loaded is None else loaded.metadata.get("base")
    if built is not None and read_merge(checkpoint.config) is None and not is_same_origin(built, checkpoint.origin):
        warn(
            f"{prior} was built for {named(built)}: whether the weights of {model} are the same is seen in training, "
            "and not here."
        )
    title = f"LoRA targets of {summary['model']} ({summary['class']})"
    table = Table("module", "adapted", "steered", "left alone", title=title)
    for row in summary["rows"]:
        steered = "no prior given" if row["steered"] is None else str(row["steered"])
        table.add_row(row["module"], str(row["adapted"]), steered, str(row["left"]))
    show(summary, as_json, table)
    if not as_json:  # in one line, whatever the terminal's width, to be copied
        targets = summary["target_modules"]
        print(f"target_modules = r'{targets}'" if isinstance(targets, str) else f"target_modules = {targets}")
