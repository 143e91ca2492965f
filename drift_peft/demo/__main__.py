"""``python -m drift_peft.demo [--out FOLDER] [--seed 0 | --seeds 3] [--steps 150] [--methods vlm lora drift]``."""

import argparse

from . import METHODS, run, study
from .train import STEPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m drift_peft.demo", description=__doc__)
    parser.add_argument("--out", help="folder that keeps everything: prior, adapters, merged models, results, pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="run seeds 0 to N-1 instead, and print means and spreads")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of every training")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    arguments = parser.parse_args()
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds is 1 or more, not {arguments.seeds}")
    given = {"methods": arguments.methods, "steps": arguments.steps}
    if arguments.seeds:
        study(range(arguments.seeds), arguments.out, **given)
    else:
        run(arguments.out, arguments.seed, **given)


if __name__ == "__main__":
    main()
