"""The base that reproduce_drift.sh asks beside what it trains, and VLMEvalKit's settings for models of its kind.

Run with the flags of sft_vlm.py. It prints a line each: the settings' file, the kind as lmms-eval calls it, the base.
"""

from __future__ import annotations

import sys
from pathlib import Path

from drift_peft.preflight import base_config
from drift_peft.recipe import read_recipe

from .arguments import RecipeParser
from .command_line import in_one_sentence

EVAL = Path(__file__).parents[1] / "eval"
SETTINGS = {"qwen2_vl": "vlmevalkit_qwen2_5_vl.json", "qwen2_5_vl": "vlmevalkit_qwen2_5_vl.json"}
SETTINGS |= {"qwen3_vl": "vlmevalkit_qwen3_vl.json"}


def base_of(arguments: list[str]) -> str:
    """As a run with these flags reads it; whole, since VLMEvalKit runs in another folder."""
    parser = RecipeParser(__doc__)
    named, flags = parser.first.parse_known_args(arguments)
    parser.set_defaults_with_config(**read_recipe(named.config))
    base = parser.parse_known_args(flags)[0].base
    if Path(base).exists():
        return str(Path(base).resolve())
    if "@" in base:
        raise ValueError(f"VLMEvalKit takes no revision, as of base {base}: download it, and name its folder")
    return base


def main(arguments: list[str]) -> None:
    with in_one_sentence("reproduce_drift.sh", ValueError, OSError):
        base = base_of(arguments)
        kind = base_config(base).model_type
        if kind not in SETTINGS:
            raise ValueError(
                f"recipes/eval has settings of VLMEvalKit for {', '.join(SETTINGS)}, and base {base} is {kind}: leave "
                "out VLMEVALKIT, and ask the models as recipes/EVALUATION.md says"
            )
    print(EVAL / SETTINGS[kind], kind, base, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
