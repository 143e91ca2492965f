"""What gating a prior does on the digits world `qwen`, beside every merge without training: text reasoning against
perception.

    python benchmarks/gates.py [--seeds 3] [--steps 400] [--size 300]     75 minutes of one core
    python benchmarks/gates.py --report                                   the tables alone, of what has been run

The demo's checkpoints. Each seed draws its own unlabelled images (240 answers of the VLM), prompts for the expert (200,
of 1 to 5 operations) and exams on test digits; all singular directions are gated, of Δ from the VLM and of Δ from the
ancestor. Every candidate of the study's merges is examined on the same exams. Finished runs are lines of
`<out>/gates.jsonl`: the same command goes on. Ends in a JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from digits_study.ledger import definition, fingerprint  # noqa: E402
from digits_study.methods import TRAINING_FREE  # noqa: E402
from digits_study.priors import make_priors  # noqa: E402
from digits_study.run import DEFAULTS, merged  # noqa: E402
from digits_study.worlds import WORLDS  # noqa: E402
from ledger import Ledger  # noqa: E402
from peft import PeftModel  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from drift_peft import KeepSet, ReasoningPrior, build_prior, gate_prior, make_keep_set, merge_baseline  # noqa: E402
from drift_peft.demo.compare import KEEP_SET, QUESTIONS, quiet, unlabelled  # noqa: E402
from drift_peft.demo.evaluate import accuracy, ask, exams  # noqa: E402
from drift_peft.demo.train import load  # noqa: E402
from drift_peft.demo.world import PERCEPTION, Digits, make_samples  # noqa: E402

WORLD = WORLDS["qwen"]
FULL_RANK = 256  # no matrix here has more
PROMPTS = 200
PRIORS = {"Δ": None, "Δ from the ancestor": WORLD.base}  # title -> reference
GATED = [  # prior, settings of gate_prior
    *(("Δ", {"keep_weight": weight}) for weight in (0.01, 0.03, 0.1, 0.3, 1.0)),
    *(("Δ from the ancestor", {"keep_weight": weight}) for weight in (1.0, 3.0, 10.0)),
    ("Δ", {"objective": "frism", "alpha": 1.0}),
]
GATING = {"max_new_tokens": 64, "top_k": 8, "gradient_checkpointing": False}
SCALES = (0.5, 1.0)  # of task arithmetic with Δ from the ancestor, which the study's merges leave out
EXAMS = "2-3 operations", *PERCEPTION, "text reasoning"


def rows() -> Iterator[tuple[str, dict]]:
    """Title and settings of the gates, and then of the merges without training."""
    for prior, settings in GATED:
        objective = settings.get("objective", "expert")
        scale = f"κ = {settings['keep_weight']:g}" if objective == "expert" else f"FRISM, α = {settings['alpha']:g}"
        yield f"gates, {prior}, {scale}", {"prior": prior, **settings}
    for key, method in TRAINING_FREE.items():
        for candidate in method.grid:
            settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in candidate.items())
            yield f"{method.title}, {settings}", {"merge": key, **candidate}
    for scale in SCALES:
        yield f"task arithmetic, {scale:g} Δ from the ancestor", {"merge": "ancestor", "scale": scale}


def run_of(settings: dict, seed: int, steps: int, size: int) -> dict:
    """What a line of the ledger is about: of a merge, not how long gates are trained."""
    return {"settings": settings, "seed": seed, "size": size, **({} if "merge" in settings else {"steps": steps})}


def made_of(run: dict) -> dict:
    merge = run["settings"].get("merge")
    way = [PROMPTS, FULL_RANK, KEEP_SET, QUESTIONS, GATING] if merge is None else merge
    way = definition(merge) if merge in TRAINING_FREE else hashlib.sha256(json.dumps(way).encode()).hexdigest()[:16]
    return {"checkpoints": fingerprint("qwen"), "way": way}


def stale(run: dict, entry: dict) -> str | None:
    if entry["checkpoints"] != fingerprint("qwen"):
        return "on other checkpoints than those that are here: restore them"
    if entry["way"] != made_of(run)["way"]:
        return f"when {run['settings']} was something else: remove its lines"
    return None


def perform(run: dict, home: Path) -> dict:
    """Exam -> share of right answers; of gates also what they were trained with, and how many seconds that took."""
    settings, seed, measured = run["settings"], run["seed"], {}
    if "merge" in settings:
        model, processor = without_training(settings, seed, home)
    else:
        model, processor = gated(settings, seed, run["steps"], home, measured)
    tests = {name: samples for name, samples in exams("test", seed, run["size"], WORLD.digits).items() if name in EXAMS}
    return {**{name: accuracy(each, ask(model, processor, each)) for name, each in tests.items()}, **measured}


def without_training(settings: dict, seed: int, home: Path):
    """A merge as the study makes it, or with Δ from the ancestor."""
    settings = dict(settings)
    key = settings.pop("merge")
    with tempfile.TemporaryDirectory(dir=home) as folder:
        if key == "ancestor":
            given = {"reference": WORLD.base, "progress": False, **settings}
            merge_baseline("task_arithmetic", WORLD.expert, WORLD.vlm, Path(folder, "merged"), **given)
            return load(Path(folder, "merged"))
        method = TRAINING_FREE[key]
        if method.merge == "export":
            make_priors(home / "priors", "qwen")
        prior = home / "priors" / f"qwen-{method.prior}.safetensors"
        return merged(WORLD, method, DEFAULTS | method.settings | settings, seed, prior, Path(folder))


def gated(settings: dict, seed: int, steps: int, home: Path, measured: dict):
    """The VLM with the gated Δ merged into it."""
    prior, settings = settings["prior"], {key: value for key, value in settings.items() if key != "prior"}
    texts = [s.symbols + s.question for s in make_samples(PROMPTS, ["solve"], np.random.default_rng([seed, 4]))]
    asked = {"expert": WORLD.expert, "texts": texts, "answers": home / f"answers{seed}.safetensors"}
    asked |= {name: GATING[name] for name in ("max_new_tokens", "top_k")}
    asked = dict.fromkeys(asked) if "objective" in settings else asked
    model, processor = load(WORLD.vlm)
    start = time.process_time()
    made = gate_prior(
        prior_of(prior, home),
        model,
        keep_set=keep_set_of(seed, home),
        output=home / "gated.safetensors",
        steps=steps,
        seed=seed,
        processor=processor,
        overwrite=True,
        progress=False,
        **(GATING | asked),
        **settings,
    )
    found = made.metadata["gated"]
    measured |= {"cpu_s": round(time.process_time() - start, 1), "keep_kl": found["keep_kl"]}
    measured |= {"text_kl": found.get("text_kl")}
    measured["mean_gate"] = float(np.mean([gate for w in made.metadata["weights"].values() for gate in w["gates"]]))
    adapter = made.as_lora(1.0, home / "adapter", base=WORLD.vlm, overwrite=True)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(), processor


def prior_of(title: str, home: Path) -> ReasoningPrior:
    file = home / f"prior{list(PRIORS).index(title)}.safetensors"
    settings = {"reference": PRIORS[title], "exist_ok": True, "progress": False}
    return build_prior(WORLD.expert, WORLD.vlm, file, FULL_RANK, **settings)


def keep_set_of(seed: int, home: Path) -> KeepSet:
    file = home / f"keep{seed}.safetensors"
    if not file.exists():
        make_keep_set(WORLD.vlm, unlabelled(Digits("train"), seed), file, QUESTIONS, **KEEP_SET, progress=False)
    return KeepSet.load(file)


# Report


def measures(result: dict) -> dict[str, float]:
    return {
        "text": result["text reasoning"],
        "perception": sum(result[task] for task in PERCEPTION) / len(PERCEPTION),
        "2-3 operations": result["2-3 operations"],
    }


def summary(ledger: Ledger, seeds: int, steps: int, size: int) -> dict[str, dict]:
    """Row -> measure -> mean and standard deviation over its seeds, of the rows that have all of them."""
    found = {}
    for title, settings in rows():
        runs = [run_of(settings, seed, steps, size) for seed in range(seeds)]
        if all(run in ledger for run in runs):
            results = [measures(ledger[run]) for run in runs]
            found[title] = {
                key: [float(np.mean(each)), float(np.std(each, ddof=1)) if len(each) > 1 else 0.0]
                for key in results[0]
                for each in [[result[key] for result in results]]
            }
    return found


def report(found: dict[str, dict], console: Console) -> dict:
    table = Table("", "text", "perception", "2-3 ops", title="Right answers in percent on test digits, qwen")
    for title, row in found.items():
        cells = (
            f"{100 * row[key][0]:.0f} ± {100 * row[key][1]:.0f}" for key in ("text", "perception", "2-3 operations")
        )
        table.add_row(title, *cells)
    console.print(table)
    points = {title: (row["text"][0], row["perception"][0]) for title, row in found.items()}
    theirs = {title: points[title] for title, settings in rows() if title in points and "merge" in settings}
    ours = {t: p for t, p in points.items() if t not in theirs and "FRISM" not in t}
    # Of the merges, those that no other one beats in both.
    frontier = {t: p for t, p in theirs.items() if not any(beats(q, p) for q in theirs.values())}
    table = Table("merge without training", "text", "perception", "gates that are better in both")
    for title, point in sorted(frontier.items(), key=lambda item: item[1]):
        better = [name.removeprefix("gates, ") for name, ours_too in ours.items() if beats(ours_too, point)]
        table.add_row(title, *(f"{100 * value:.0f}" for value in point), "; ".join(better) or "none")
    console.print(table)
    beaten = {title: [t for t, p in theirs.items() if beats(point, p)] for title, point in ours.items()}
    counts = {"merges": len(theirs), "beaten": len(set().union(*beaten.values()))}
    console.print(f"Some gates are better in both than {counts['beaten']} of {len(theirs)} merges without training.")
    if beaten:
        best = max(beaten, key=lambda title: len(beaten[title]))
        counts |= {"best_row": best, "beaten_by_best_row": len(beaten[best])}
        console.print(f"The best row of gates, {best!r}, is better in both than {len(beaten[best])} of them.")
    return {"rows": found, **counts}


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a > b for a, b in zip(one, other, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of training the gates (default: %(default)s)")
    parser.add_argument("--size", type=int, default=300, help="samples per exam (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of finished runs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose titles hold one of these")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = {"steps": args.steps, "size": args.size}
    ledger = Ledger(args.out / "gates.jsonl", made_of, stale)
    with quiet(), tempfile.TemporaryDirectory() as home:
        for seed in [] if args.report else range(args.seeds):
            for title, settings in rows():
                run = run_of(settings, seed, **sizes)
                if any(text in title for text in args.only) and run not in ledger:
                    ledger.add(run, perform(run, Path(home)))
    result = report(summary(ledger, args.seeds, **sizes), Console(width=120))
    print(f"gates: {args.steps} steps of Adam at 0.1, {PROMPTS} prompts, {KEEP_SET['samples']} kept answers")
    print(f"{args.seeds} seeds of each row; rows that lack one are left out")
    print(json.dumps({"benchmark": "gates", "seeds": args.seeds, **sizes, **result}))


if __name__ == "__main__":
    main()
