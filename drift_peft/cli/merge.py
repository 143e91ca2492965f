"""drift-peft merge: adapter + full-precision base -> standalone model."""

from __future__ import annotations

from dataclasses import asdict
from typing import get_args

from ..choices import Onto
from .parser import Parser

HELP = "adapter + full-precision base -> standalone model"
DESCRIPTION = "Merge a LoRA adapter into its full-precision base, streaming, as a standalone folder."
EXAMPLE = "drift-peft merge --base Qwen/Qwen2.5-VL-7B-Instruct --adapter adapter -o merged --verify"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="full-precision model: folder, hub id or id@revision")
    add("--adapter", required=True, help="adapter folder or hub id, DRIFT or plain LoRA")
    add("-o", "--output", required=True, help="folder to write")
    add(
        "--onto",
        choices=get_args(Onto),
        default="base",
        help="base, or dequantized: the 4-bit base's numbers, as it was trained on",
    )
    add("--verify", action="store_true", help="also load both models, in turn, and compare the ways to serve")
    add("--force", action="store_true", help="merge even into another model than the adapter was trained on")
    add("--overwrite", action="store_true", help="replace an existing model folder")
    parser.add_json()


def run(as_json: bool, **settings) -> None:
    from ..merge import merge_adapter, verification_table
    from .show import facts, show

    report = merge_adapter(**settings)
    change = "they were zero" if report.relative_change is None else f"{report.relative_change:.2e}"
    verified = "not verified (--verify)" if report.logits_error is None else f"{report.logits_error:.2e}"
    rows = {
        "adapter modules merged": report.modules,
        "tensors written": report.tensors,
        "change of the merged weights ‖W' − W‖/‖W‖": change,
        **({} if report.trained_on is None else {"the base in training": report.trained_on}),
        "logits against base + adapter, relative error": verified,
    }
    parts = [facts(f"merged into {report.output}", rows)]
    if report.verification is not None:
        parts += [verification_table(report.verification), report.verification.verdict]
    show(asdict(report), as_json, *parts)
