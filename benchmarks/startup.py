"""What an answer without work costs: CPU seconds of `drift-peft --help`, `--version`, each verb's help and a refusal.

python benchmarks/startup.py [--repeats 5]

Each is a process of its own, from Python's start to its end; user and system time together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

if sys.platform == "win32":
    raise SystemExit("startup.py: error: Windows does not tell the CPU time of a child: run it on Linux or macOS")

import resource

from rich.console import Console
from rich.table import Table

from drift_peft.cli.commands import VERBS
from drift_peft.cli.prior import VERBS as PRIOR_VERBS

HELP = [*([name] for name in VERBS), *(["prior", name] for name in PRIOR_VERBS)]
CALLS = [["--version"], ["--help"], *([*verb, "--help"] for verb in HELP), ["prior", "build", "--rnak", "3"]]


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2), done.stderr.decode()
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(call: list[str], repeats: int) -> dict:
    """One call as a process, several times."""
    times = [cpu_seconds([sys.executable, "-m", "drift_peft", *call]) for _ in range(repeats)]
    return {"call": " ".join(call), "least_s": min(times), "median_s": statistics.median(times), "most_s": max(times)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smallest", action="store_true", help="--version and --help alone")
    args = parser.parse_args(argv)
    python = min(cpu_seconds([sys.executable, "-c", ""]) for _ in range(args.repeats))
    rows = [measure(call, args.repeats) for call in (CALLS[:2] if args.smallest else CALLS)]
    table = Table("drift-peft", "least", "median", "most", title="CPU seconds of an answer without work")
    for row in rows:
        table.add_row(row["call"], *(f"{row[key]:.3f}" for key in ("least_s", "median_s", "most_s")))
    console = Console(width=100)
    console.print(table)
    console.print(f"Python alone: {python:.3f} s")
    print(json.dumps({"benchmark": "startup", "python_s": python, "rows": rows}))


if __name__ == "__main__":
    main()
