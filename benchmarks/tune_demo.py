"""Choose the demo's learning rates on validation digits: `python benchmarks/tune_demo.py [METHOD …]`, into tuning.json.

All methods that train get the same grid, the same seeds and the same criterion: the mean of the table's four measures.
Naming methods renews their part of the file alone.
"""

from __future__ import annotations

import argparse
import json

from drift_peft.demo.compare import METHODS, TUNING, run
from drift_peft.demo.evaluate import MEASURES

GRID = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
SEEDS = (100,)  # not those of the README's table
TRAINED = [key for key, method in METHODS.items() if method.trained]


def tune(keys: list[str]) -> dict:
    """Run the grid for these methods and write it, with the best rate by method, to tuning.json."""
    known = json.loads(TUNING.read_text(encoding="utf-8"))["validation"] if set(keys) != set(TRAINED) else {}
    scores = {key: {} if key in keys else known[key] for key in TRAINED}
    for rate in GRID:
        rates = dict.fromkeys(keys, rate)
        runs = [run(None, seed, keys, split="validation", rates=rates, size=200, show=False) for seed in SEEDS]
        for key in keys:
            row = {name: sum(r["scores"][key][name] for r in runs) / len(runs) for name in MEASURES}
            scores[key][f"{rate:g}"] = {name: round(value, 4) for name, value in row.items()}
            print(f"{key:10} {rate:g} {scores[key][f'{rate:g}']}", flush=True)
    best = {key: float(max(grid, key=lambda rate: sum(grid[rate].values()))) for key, grid in scores.items()}
    result = {"criterion": f"mean over {', '.join(MEASURES)}", "seeds": SEEDS, "best": best, "validation": scores}
    TUNING.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=TRAINED, metavar="METHOD")
    keys = parser.parse_args(argv).methods
    if unknown := set(keys) - set(TRAINED):
        parser.error(f"nothing to tune for {', '.join(sorted(unknown))}: name some of {', '.join(TRAINED)}")
    tune(keys)


if __name__ == "__main__":
    main()
