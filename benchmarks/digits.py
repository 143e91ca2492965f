"""What DRIFT with LoRA is worth on the digits worlds, measured against everything a user would do instead.

    python benchmarks/digits.py                 what has not been run yet, then the report: hours on two cores
    python benchmarks/digits.py --minutes 60    stop after an hour; the same command goes on later
    python benchmarks/digits.py --worlds qwen --methods lora-keep drift-keep
                                                these runs of the plan alone, before the others
    python benchmarks/digits.py --report        the report alone, of what has been run
    python benchmarks/digits.py --quick         a few methods on one world, in small sizes

Finished runs are lines of `<out>/digits.jsonl`. The report is RESULTS.md, one page; its appendices, its figures and
`digits.json` with all its numbers lie in `<out>`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from digits_study.collect import collect  # noqa: E402
from digits_study.ledger import Ledger, fingerprint  # noqa: E402
from digits_study.plan import FULL, QUICK, SMALLEST, Plan  # noqa: E402
from digits_study.priors import make_priors  # noqa: E402
from digits_study.report import write  # noqa: E402
from digits_study.run import perform  # noqa: E402
from forks import fork_context  # noqa: E402
from tqdm import tqdm  # noqa: E402


def execute(ledger: Ledger, plan: Plan, priors: Path, processes: int, deadline: float | None) -> None:
    """Carry out what is missing, each run in a process of its own, until the deadline."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = fork_context("digits_study.run")
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}  # there is a process for each core
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1, **one_thread) as pool:
        for title, stage in plan.stages():
            runs = [run for run in unique(stage(ledger)) if run not in ledger]
            for world in {run["world"] for run in runs}:
                make_priors(priors / fingerprint(world), world)
            waiting, bar = iter(runs), tqdm(total=len(runs), desc=title, unit="run")
            running, failed = {}, {}
            while True:
                late = deadline is not None and time.monotonic() > deadline
                stop = late or failed
                while not stop and len(running) < processes and (run := next(waiting, None)) is not None:
                    running[pool.submit(perform, run, priors / fingerprint(run["world"]))] = run
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(done)
                    if (error := done.exception()) is not None:
                        failed[json.dumps(run)] = error
                        continue
                    ledger.add(run, done.result())
                    bar.update()
            bar.close()
            if failed:
                raise RuntimeError(f"failed: {'; '.join(failed)}; the others are kept") from next(iter(failed.values()))
            if late:
                return


def unique(runs: list[dict]) -> list[dict]:
    return list({json.dumps(run, sort_keys=True): run for run in runs}.values())


def chosen(kind: str, names: list[str] | None, planned: tuple[str, ...]) -> tuple[str, ...]:
    """What the user named of what is planned, in the order of the plan; everything where nothing was named."""
    if unknown := [name for name in names or () if name not in planned]:
        raise ValueError(f"{unknown[0]!r} is no {kind} of this plan, which has {', '.join(planned)}")
    return tuple(name for name in planned if names is None or name in names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const=QUICK, dest="plan", help="a few methods on one world")
    size.add_argument("--smallest", action="store_const", const=SMALLEST, dest="plan", help="shows that it works")
    parser.add_argument("--out", type=Path, help="folder of runs and report; benchmarks/results, or runs/digits")
    parser.add_argument("--priors", type=Path, default=Path("runs/digits-priors"), help="folder that keeps the priors")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--worlds", nargs="+", metavar="WORLD", help="run these worlds of the plan alone")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="run these methods of the plan alone")
    parser.add_argument("--report", action="store_true", help="run nothing, and write the report")
    given = parser.parse_args(arguments)
    plan = given.plan or FULL
    out = given.out or (HERE / "results" if plan is FULL else Path("runs/digits"))
    page = HERE / "RESULTS.md" if out == HERE / "results" else out / "RESULTS.md"
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    ledger = Ledger(out / "digits.jsonl")
    if not given.report:
        part = replace(plan, worlds=chosen("world", given.worlds, plan.worlds))
        part = replace(part, methods=chosen("method", given.methods, plan.methods))
        execute(ledger, part, given.priors, given.processes, deadline)
    out.mkdir(parents=True, exist_ok=True)
    results = collect(ledger, plan)
    (out / "digits.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results, out, page)
    print(f"{page}, {out}/digits.json and the pictures beside it show {results['runs']} runs.")
    print(json.dumps({"runs": results["runs"], "missing": results["known_missing"], "hours": results["hours"]}))


if __name__ == "__main__":
    main()
