"""Whether reproduce_drift.sh can train a recipe in each of its ways and ask it, before it trains the first one.

Run with the flags of sft_vlm.py. Where VLMEVALKIT is set, it prints what that is asked with, a line each.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields

from drift_peft.preflight import DRIFT, LORA, RunArguments, adapter_of, check_together
from drift_peft.recipe import read_recipe

from .arguments import RecipeParser, refuse_forgotten
from .command_line import in_one_sentence
from .eval_settings import asked

WAYS = (("sft", 0.2), ("drift", None))  # method and merge_first; what both can, the ways without keeping can, too
SET = ("method", "merge-first", "replay", "output-dir", "merge", "resume-from-checkpoint")  # by the script


def checked(arguments: list[str]) -> str:
    """The base. ValueError for what a later run would refuse, or what would not be what its way is called."""
    parser = RecipeParser(__doc__)
    named, flags = parser.first.parse_known_args(arguments)
    parser.set_defaults_with_config(**read_recipe(named.config))
    settings = vars(parser.parse_known_args(flags)[0])
    given = [flag.lstrip("-") for flag in parser.given]
    if own := [flag for flag in given if flag in SET]:
        raise ValueError(f"--{own[0]} is set for each way by the script itself: leave it out")
    for method, merge_first in WAYS:
        way = {**settings, "method": method, "merge_first": merge_first, "replay": 0.0}
        run = RunArguments(**{field.name: way[field.name] for field in fields(RunArguments)})
        refuse_forgotten(run, [*parser.named, *(flag.replace("-", "_") for flag in given)])
        if run.keep is None:
            what = "names none in keep" if run.keep_weight else "has keep_weight=0, which keeps nothing"
            raise ValueError(f"drift-keep keeps by a keep set, and the recipe {what}: set it, as the recipes here do")
        check_together(run, adapter_of(run, {name: way[name] for name in (*LORA, *DRIFT)}), way)
    return settings["base"]


def main(arguments: list[str]) -> None:
    with in_one_sentence("reproduce_drift.sh", ValueError, OSError):
        base = checked(arguments)
        if os.environ.get("VLMEVALKIT"):
            print(*asked(base), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
