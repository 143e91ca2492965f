"""drift-peft prior build: two checkpoints -> prior file."""

from __future__ import annotations

from ..choices import DEFAULT_MODULES, MAX_RANK, MODULES, RANK
from .layers import layers
from .parser import Parser, file_such_as

HELP = "two checkpoints -> prior file"
DESCRIPTION = "Take Δ = expert − base for each language-model weight and write it as a low-rank prior."
EXAMPLE = r"""drift-peft prior build --expert deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \
  --base Qwen/Qwen2.5-VL-7B-Instruct -o prior.safetensors"""


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--expert", required=True, help="text-only reasoning model: folder, hub id or id@revision")
    add("--base", required=True, help="vision-language model, in full precision")
    add("--reference", help="take Δ = expert − reference: the model that the expert was trained from")
    add(
        "-o",
        "--output",
        required=True,
        type=file_such_as("prior.safetensors"),
        help="file to write, such as prior.safetensors",
    )
    add("--rank", type=int, help=f"largest rank of Δ per weight (default: {RANK})")
    add("--energy", type=float, help="instead: per weight the smallest rank with this share of ‖Δ‖²")
    add("--max-rank", type=int, metavar="RANK", help=f"largest rank with --energy (default: {MAX_RANK})")
    add(
        "--modules",
        nargs="+",
        choices=MODULES,
        default=list(DEFAULT_MODULES),
        metavar="KIND",
        help=f"which weights: %(choices)s (default: {' '.join(DEFAULT_MODULES)})",
    )
    add("--only-layers", nargs="+", metavar="LAYERS", help="these layers alone, from 0 on, such as 0 4 8-27")
    add("--skip-first", type=int, default=0, metavar="N", help="not the first so many layers")
    add("--dequantize", action="store_true", help="accept models that are 4-bit on disk")
    add("--delete-shards", action="store_true", help="free each shard of the expert that was downloaded for this")
    add("--seed", type=int, default=0, help="seed of the randomized SVD")
    add("--device", help="where to compute, such as cuda (default: a GPU if there is one)")
    add("--force", action="store_true", help="build even when the two models seem unrelated")
    add(
        "--overwrite", action="store_true", help="replace an existing output, or an interrupted build of other settings"
    )
    add("--exist-ok", action="store_true", help="take an existing output of the same models and settings")
    parser.add_json()


def run(only_layers: list[str] | None, energy: float | None, as_json: bool, **settings) -> None:
    numbers = layers(only_layers)
    from ..prior import build_prior
    from ..prior.report import prior_summary, prior_table
    from .show import show

    summary = prior_summary(build_prior(only_layers=numbers, energy=energy, **settings))
    parts = [prior_table(summary)]
    if energy is not None:
        weights = summary["weights"].values()
        capped = sum(weight["energy"] < energy for weight in weights)
        parts.append(f"{capped} of {len(weights)} weights are capped at rank {summary['max_rank']}, below {energy:.1%}")
    show(summary, as_json, *parts)
