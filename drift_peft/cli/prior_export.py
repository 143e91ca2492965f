"""drift-peft prior export: the prior itself as a LoRA adapter."""

from __future__ import annotations

from .parser import Parser

HELP = "the prior itself as a LoRA adapter"
DESCRIPTION = "Write scale·Δ as a plain LoRA adapter for stock PEFT: task arithmetic, no training."
EXAMPLE = "drift-peft prior export prior.safetensors --scale 0.5 -o folder"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("prior", metavar="PRIOR", help="prior file, hub id or id@revision")
    add("--scale", type=float, required=True, help="how much of Δ to add, such as 0.1")
    add("-o", "--output", required=True, help="folder to write")
    add("--base", help="where the base is now (default: where it was when the prior was built)")
    add("--overwrite", action="store_true", help="replace an existing adapter folder")
    parser.add_json()


def run(prior: str, scale: float, output: str, base: str | None, overwrite: bool, as_json: bool) -> None:
    from ..prior import ReasoningPrior
    from .show import facts, show

    folder = ReasoningPrior.load(prior).as_lora(scale, output, base, overwrite)
    rows = {"adds": f"{scale:g}·Δ, with the LoRA scaling 1"}
    rows["load with"] = f'PeftModel.from_pretrained(vlm, "{folder}")'
    show({"output": folder, "scale": scale}, as_json, facts(f"LoRA adapter {folder}", rows))
