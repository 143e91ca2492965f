"""drift-peft merge-baseline: expert + VLM -> VLM without training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..choices import MERGED_MODULES, METHODS
from .layers import layers
from .parser import Parser

HELP = "expert + VLM -> VLM without training, to compare with"
DESCRIPTION = (
    "Merge a text-only expert into a VLM without training: the baselines of the DRIFT paper's table 2. "
    "Defaults are those of its table 9 (arXiv 2510.15050v2); the density and what its k counts, which the table "
    "leaves open, are those of the code of BR2V (arXiv 2505.05464), its source. "
    "ties is PEFT's; mergekit's makes another model of the same weights and density."
)
EXAMPLE = r"""drift-peft merge-baseline --method ties --expert deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \
  --base Qwen/Qwen2.5-VL-7B-Instruct --reference Qwen/Qwen2.5-7B -o merged"""


def flags(parser: Parser) -> None:
    add = parser.add_argument
    plain, sparse, left = METHODS["task_arithmetic"], METHODS["ties"], METHODS["layer_swap"].skip_first
    weights = "{} {}; for ties and dare {} {}".format(*plain.weights, *sparse.weights)
    add("--method", required=True, choices=METHODS, metavar="METHOD", help="one of %(choices)s")
    add("--expert", required=True, help="text-only reasoning model: folder, hub id or id@revision")
    add("--base", required=True, help="vision-language model, in full precision")
    add("--reference", help="model that both were trained from; ties and dare need it, or a scale")
    add("-o", "--output", required=True, help="folder to write")
    add("--scale", type=float, help="merge base + scale·Δ: one task vector instead of two")
    add(
        "--weights",
        type=float,
        nargs=2,
        metavar=("BASE", "EXPERT"),
        help=f"of the task vectors of base and expert (default: {weights})",
    )
    add("--density", type=float, help=f"share of entries that ties and dare keep (default: {sparse.density})")
    add(
        "--modules",
        nargs="+",
        choices=MERGED_MODULES,
        metavar="KIND",
        help="which weights: %(choices)s (default: all that there are)",
    )
    add("--only-layers", nargs="+", metavar="LAYERS", help="these layers alone, from 0 on, such as 0 4 8-27")
    add(
        "--skip-first",
        type=int,
        metavar="N",
        help=f"not the first so many layers (default: {left} for layer_swap, else 0)",
    )
    add("--seed", type=int, default=0, help="seed of what dare keeps")
    add("--force", action="store_true", help="merge even when the two models seem unrelated")
    add("--overwrite", action="store_true", help="replace an existing model folder")
    add("--exist-ok", action="store_true", help="take an existing folder of the same models and settings")
    parser.add_json()


def run(only_layers: list[str] | None, as_json: bool, **settings) -> None:
    numbers = layers(only_layers)
    from ..checkpoints import describe
    from ..merge import merge_baseline
    from .show import facts, show

    taken = settings["exist_ok"] and Path(settings["output"]).exists()
    report = merge_baseline(only_layers=numbers, **settings)
    left, change = describe(report.without_counterpart), report.relative_change
    unknown = "not measured again: the folder exists" if taken else "they were zero"
    rows = {
        "weights of the task vectors": ", ".join(f"{weight:g}" for weight in report.weights),
        "density": "all entries" if report.density is None else f"{report.density:g}",
        "weights merged": report.merged,
        **({"not merged, of another kind or not in the expert": left} if left else {}),
        "tensors written": report.tensors,
        "change of the merged weights ‖W' − W‖/‖W‖": unknown if change is None else f"{change:.2e}",
    }
    show(asdict(report), as_json, facts(f"{report.method} merged into {report.output}", rows))
