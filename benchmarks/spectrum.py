"""What `drift_spectrum` does on the digits world: S^p in place of S, for p = 0 (flat), 0.5, 1 (full) and 2.

python benchmarks/spectrum.py [--seeds 3] [--steps 150] [--size 300]

The demo's world and training; each power at DRIFT's own learning rate, which was chosen for p = 1. Prints the demo's
table over the seeds and ends in a JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from drift_peft.demo.compare import METHODS, Method, learning_rates, study
from drift_peft.demo.evaluate import MEASURES

SPECTRA = {"flat": "flat", "p = 0.5": 0.5, "full": "full", "p = 2": 2.0}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--size", type=int, default=300, help="samples per exam")
    args = parser.parse_args(argv)
    METHODS.update({name: Method(name, trained=True, drift={"drift_spectrum": p}) for name, p in SPECTRA.items()})
    rates = dict.fromkeys(SPECTRA, learning_rates()["drift"])
    results = study(range(args.seeds), methods=list(SPECTRA), rates=rates, steps=args.steps, size=args.size)
    rows = {
        name: {key: np.mean([r["scores"][name][key] for r in results]).round(4) for key in MEASURES} for name in SPECTRA
    }
    print(json.dumps({"benchmark": "spectrum", "seeds": args.seeds, "steps": args.steps, "scores": rows}))


if __name__ == "__main__":
    main()
