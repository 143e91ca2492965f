"""drift-peft transplant: a text fine-tune or LoRA adapter -> adapter of the VLM, or VLM, without training."""

from __future__ import annotations

from dataclasses import asdict

from ..choices import RANK
from .parser import Parser, number_or_auto

HELP = "text fine-tune or LoRA adapter -> adapter of the VLM, or VLM, without training"
DESCRIPTION = (
    "Bring what a text-only fine-tune has learned into a VLM of its family, without training. A LoRA adapter becomes "
    "one of the VLM without loss; of a full fine-tune, an adapter holds Δ at a rank, and a merged VLM all. A keep "
    "set measures what the scale costs: how far the VLM goes from its own answers."
)
EXAMPLE = r"""drift-peft transplant --expert deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \
  --base Qwen/Qwen2.5-VL-7B-Instruct --reference Qwen/Qwen2.5-Math-7B --rank 64 \
  --keep keep.safetensors --scale auto --budget 0.1 -o adapter"""


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--expert", required=True, help="LoRA adapter or full fine-tune, on text: folder, hub id or id@revision")
    add("--base", required=True, help="vision-language model, in full precision")
    add("-o", "--output", required=True, help="folder to write")
    add("--reference", help="model that the expert was trained from (default: Δ is expert − base)")
    add("--rank", type=int, help=f"ceiling of the rank of a full fine-tune's Δ (default: {RANK})")
    add("--energy", type=float, help="instead of a rank: the share of Δ to hold, such as 0.9")
    add("--merged", action="store_true", help="write a VLM in full precision instead of an adapter")
    add(
        "--scale",
        type=number_or_auto,
        default=1.0,
        help="how much of Δ to add; auto: as much as --budget allows",
    )
    add("--keep", metavar="KEEP_SET", help="measure what the scale costs, on these answers of the base")
    add("--budget", type=float, metavar="NATS", help="with --scale auto: KL to those answers to stay below, a token")
    add("--load-in-4bit", action="store_true", help="measure on the model in NF4")
    parser.add_processor_kwargs()
    add("--batch-size", type=int, metavar="N", help="answers at a time, where the cost is measured (default: 8)")
    add("--force", action="store_true", help="go on even when the two models seem unrelated")
    add("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_json()


def run(as_json: bool, **settings) -> None:
    from ..checkpoints import describe
    from ..merge import cost_table, transplant
    from .show import facts, show

    report = transplant(**settings)
    stay = "embedding and head" if settings["merged"] else "norms, biases, embedding and head"
    rows = {
        "weights merged" if settings["merged"] else "modules of the adapter": report.modules,
        "scale": f"{report.scale:g}",
        **({"energy of their Δ that is held": f"{report.energy:.1%}"} if report.energy < 1 else {}),
        "not changed": ", ".join(filter(None, [stay, describe(report.left_alone)])),
    }
    costs = [cost_table(report.costs, report.scale)] if report.costs else []
    show(asdict(report), as_json, facts(f"transplanted into {report.output}", rows), *costs)
