"""drift-peft preflight: will training fit the GPU?"""

from __future__ import annotations

from pathlib import Path

from .parser import Parser

HELP = "will training fit the GPU?"
DESCRIPTION = "Estimate what training takes on the GPU, from a recipe and its base, without the weights."
EXAMPLE = "drift-peft preflight recipes/configs/qwen2_5_vl_7b_r1.yaml --set max_tokens=2048 --set r=8"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML of recipes/sft_vlm.py")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings that win over it, such as max_tokens=2048",
    )
    add("--gates", action="store_true", help="what gating its prior takes (drift-peft prior gate), instead of training")
    parser.add_json()


def run(recipe: str, set: list[str], gates: bool, as_json: bool) -> None:
    changes = dict(_setting(text) for text in set)
    if not Path(recipe).exists():  # told now, and not after the seconds that torch takes to import
        from ..recipe import read_recipe

        read_recipe(recipe)
    from ..preflight import (
        cards_table,
        gating_summary,
        gating_table,
        keeping_sentence,
        preflight_summary,
        preflight_table,
    )
    from .show import show

    if gates:
        summary = gating_summary(recipe, changes)
        show(summary, as_json, gating_table(summary))
        return
    from rich.console import Console

    with Console(stderr=True).status("counting what the layers keep; with linear attention this takes a minute"):
        summary = preflight_summary(recipe, changes)
    sentences = filter(None, [keeping_sentence(summary)])
    show(summary, as_json, preflight_table(summary), cards_table(summary), *sentences)


def _setting(text: str) -> tuple[str, object]:
    """max_tokens=2048 -> the key and its value, read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} names no value: write key=value, such as max_tokens=2048")
    import yaml

    from ..recipe import read_yaml

    try:
        return key, read_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text} is no YAML: {' '.join(str(error).split())}") from error
