"""What DRIFT with LoRA is worth on the digits worlds, measured against everything a user would do instead.

    python benchmarks/digits.py                 what has not been run yet, then the report: hours on two cores
    python benchmarks/digits.py --minutes 60    stop after an hour; the same command goes on later
    python benchmarks/digits.py --report        the report alone, of what has been run
    python benchmarks/digits.py --quick         a few methods on one world, in under five minutes

Finished runs are lines of ``<out>/digits.jsonl``; the report is ``<out>/digits.json``, pictures, and RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from digits_study.ledger import Ledger  # noqa: E402
from digits_study.plan import stages  # noqa: E402
from digits_study.run import make_priors, perform  # noqa: E402
from tqdm import tqdm  # noqa: E402


def execute(ledger: Ledger, plan, priors: Path, processes: int, deadline: float | None) -> bool:
    """Carry out what is missing, each run in a process of its own. False if time was up before the end."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # imports once, for all runs; the server does not inherit sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        context.set_forkserver_preload(["digits_study.run"])
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        for title, stage in plan:
            runs = [run for run in unique(stage(ledger)) if run not in ledger]
            for world in {run["world"] for run in runs}:
                make_priors(priors, world)
            waiting, bar = iter(runs), tqdm(total=len(runs), desc=title, unit="run")
            running = {}
            while True:
                late = deadline is not None and time.monotonic() > deadline
                while not late and len(running) < processes and (run := next(waiting, None)) is not None:
                    running[pool.submit(perform, run, priors)] = run
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    ledger.add(running.pop(done), done.result())
                    bar.update()
            bar.close()
            if late:
                return False
    return True


def unique(runs: list[dict]) -> list[dict]:
    return list({json.dumps(run, sort_keys=True): run for run in runs}.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of runs and report")
    parser.add_argument("--priors", type=Path, default=Path("runs/digits-priors"), help="folder that keeps the priors")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    given = parser.parse_args(arguments)
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    ledger = Ledger(given.out / "digits.jsonl")
    execute(ledger, stages(), given.priors, given.processes, deadline)


if __name__ == "__main__":
    main()
