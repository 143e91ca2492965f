"""drift-peft demo: the whole way on a small embedded world."""

from __future__ import annotations

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
    add("--seed", type=int, default=0, help="seed of data, start and training")
    add("--processes", type=int, default=2, help="rows at a time, one CPU core each")


def run(out: str | None, seed: int, processes: int) -> None:
    if processes < 1:
        raise ValueError(f"--processes {processes}: give 1 or more")
    from ..demo import METHODS  # needs the extra `demo`, and says so
    from ..demo import run as run_demo

    if processes == 1:
        run_demo(out, seed)
        return
    with workers(min(processes, len(METHODS))) as executor:
        run_demo(out, seed, executor=executor)
