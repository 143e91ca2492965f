"""drift-peft demo: the whole way on a small embedded world."""

from __future__ import annotations

from argparse import SUPPRESS
from contextlib import nullcontext

from .parser import Parser
from .workers import workers

HELP = "the whole way on a small embedded world"
DESCRIPTION = "Watch DRIFT move a text expert's reasoning into a vision-language model, in minutes."
EXAMPLE = "drift-peft demo --out runs/demo"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--out",
        metavar="FOLDER",
        help="keep everything in this folder: prior, adapter, merged model, results, pictures (default: keep nothing)",
    )
    add(
        "--seed",
        dest="seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seed of data, start and training; of more than one, such as 0 1 2, means and spreads (default: 0)",
    )
    add("--steps", type=int, default=150, help="optimizer steps of every training")
    add("--methods", nargs="+", default=SUPPRESS, metavar="METHOD", help="rows, such as lora drift (default: all)")
    add("--processes", type=int, default=2, help="rows at a time, one CPU core each")


def run(out: str | None, seeds: list[int], steps: int, processes: int, **given) -> None:
    for name, number in (("steps", steps), ("processes", processes)):
        if number < 1:
            raise ValueError(f"--{name} {number}: give 1 or more")
    if min(seeds) < 0:
        raise ValueError(f"--seed {min(seeds)}: give 0 or more")
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"--seed {twice[0]} is given twice, which tells nothing of the spread: give other seeds")
    from ..demo import METHODS, study  # needs the extra `demo`, and says so
    from ..demo import run as run_demo

    with nullcontext() if processes == 1 else workers(min(processes, len(METHODS))) as executor:
        given |= {"steps": steps, "executor": executor}
        if len(seeds) > 1:
            study(seeds, out, **given)
        else:
            run_demo(out, *seeds, **given)
