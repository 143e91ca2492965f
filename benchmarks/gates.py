"""What gating a prior does on the digits world `qwen`, beside every merge without training: text reasoning against
perception.

    python benchmarks/gates.py [--seeds 3] [--steps 400] [--size 300]     about an hour of one core
    python benchmarks/gates.py --report                                   the tables alone, of what has been run

The demo's checkpoints. Each seed draws its own unlabelled images (240 answers of the VLM), prompts for the expert (200,
of 1 to 5 operations) and exams on test digits; all singular directions are gated, of Δ from the VLM and of Δ from the
ancestor. Task arithmetic is examined on the same exams; of all the study's merges every candidate is read from its runs
on validation digits. Finished runs are lines of ``<out>/gates.jsonl``: the same command goes on. Ends in a JSON line.
"""

from __future__ import annotations

import argparse
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
from digits_study.ledger import Ledger  # noqa: E402
from digits_study.methods import TRAINING_FREE  # noqa: E402
from digits_study.plan import FULL  # noqa: E402
from digits_study.run import scores  # noqa: E402
from digits_study.worlds import WORLDS  # noqa: E402
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
# Of task arithmetic; of smaller ones, and of other merges, the study's runs on validation digits say enough.
SCALES = {"Δ": (0.5, 0.6, 0.7, 0.8, 0.9), "Δ from the ancestor": (0.5, 1.0)}
EXAMS = "2-3 operations", *PERCEPTION, "text reasoning"


def rows() -> Iterator[tuple[str, dict]]:
    for prior, settings in GATED:
        objective = settings.get("objective", "expert")
        scale = f"κ = {settings['keep_weight']:g}" if objective == "expert" else f"FRISM, α = {settings['alpha']:g}"
        yield f"gates, {prior}, {scale}", {"prior": prior, **settings}
    for prior, scales in SCALES.items():
        for scale in scales:
            yield f"task arithmetic, {scale:g} {prior}", {"prior": prior, "scale": scale}


def perform(settings: dict, seed: int, steps: int, size: int, home: Path) -> dict:
    """Exam -> share of right answers; of gates also what they were trained with, and how many seconds that took."""
    measured: dict = {}
    if "scale" in settings:
        given = {"reference": PRIORS[settings["prior"]], "scale": settings["scale"], "progress": False}
        merge_baseline("task_arithmetic", WORLD.expert, WORLD.vlm, home / "merged", overwrite=True, **given)
        model, processor = load(home / "merged")
    else:
        model, processor = gated(settings, seed, steps, home, measured)
    tests = {name: samples for name, samples in exams("test", seed, size, WORLD.digits).items() if name in EXAMS}
    return {**{name: accuracy(each, ask(model, processor, each)) for name, each in tests.items()}, **measured}


def gated(settings: dict, seed: int, steps: int, home: Path, measured: dict):
    """The VLM with the gated Δ merged into it."""
    prior, settings = settings["prior"], {key: value for key, value in settings.items() if key != "prior"}
    texts = [s.symbols + s.question for s in make_samples(PROMPTS, ["solve"], np.random.default_rng([seed, 4]))]
    asked = {"expert": WORLD.expert, "texts": texts, "answers": home / f"answers{seed}.safetensors"}
    asked = dict.fromkeys(asked) if "objective" in settings else asked
    model, processor = load(WORLD.vlm)
    start = time.process_time()
    made = gate_prior(
        prior_of(prior, home),
        model,
        keep_set=keep_set_of(seed, home),
        output=home / "gated.safetensors",
        max_new_tokens=64,
        top_k=8,
        steps=steps,
        gradient_checkpointing=False,
        seed=seed,
        processor=processor,
        overwrite=True,
        progress=False,
        **asked,
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


def summary(runs: dict[tuple[str, int], dict]) -> dict[str, dict]:
    """Row -> measure -> mean and standard deviation over its seeds."""
    found = {}
    for title, _ in rows():
        results = [measures(result) for (name, _), result in runs.items() if name == title]
        if results:
            found[title] = {
                key: [float(np.mean(each)), float(np.std(each, ddof=1)) if len(each) > 1 else 0.0]
                for key in results[0]
                for each in [[result[key] for result in results]]
            }
            found[title]["seeds"] = len(results)
    return found


def merges_of_the_study() -> dict[str, tuple[float, float]]:
    """Every candidate of every merge without training, on validation digits: text reasoning and perception."""
    ledger, found = Ledger(HERE / "results" / "digits.jsonl"), {}
    for key, method in TRAINING_FREE.items():
        for candidate, run in zip(method.grid, FULL.tuning_runs("qwen", key), strict=True):
            if method.merge and run in ledger:
                right = scores(ledger[run], FULL.tuning_size)
                settings = ", ".join(f"{name} {value}" for name, value in candidate.items())
                found[f"{method.title}, {settings}"] = right["text reasoning"].mean(), right["perception"].mean()
    return found


def report(runs: dict, console: Console) -> dict:
    found = summary(runs)
    table = Table("", "text", "perception", "2-3 ops", "seeds", title="Right answers in percent on test digits, qwen")
    for title, row in found.items():
        cells = (
            f"{100 * row[key][0]:.0f} ± {100 * row[key][1]:.0f}" for key in ("text", "perception", "2-3 operations")
        )
        table.add_row(title, *cells, str(row["seeds"]))
    console.print(table)
    points = {title: (row["text"][0], row["perception"][0]) for title, row in found.items()}
    ours = {title: point for title, point in points.items() if title.startswith("gates") and "FRISM" not in title}
    theirs = {title: point for title, point in points.items() if title.startswith("task")} | {
        f"{title} (validation)": point for title, point in merges_of_the_study().items()
    }
    # Of the merges, those that no other one beats in both.
    frontier = {t: p for t, p in theirs.items() if not any(beats(q, p) for q in theirs.values())}
    table = Table("merge without training", "text", "perception", "gates that are better in both")
    for title, point in sorted(frontier.items(), key=lambda item: item[1]):
        better = [name.removeprefix("gates, ") for name, ours_too in ours.items() if beats(ours_too, point)]
        table.add_row(title, *(f"{100 * value:.0f}" for value in point), "; ".join(better) or "none")
    console.print(table)
    beaten = {t: any(beats(q, p) for q in ours.values()) for t, p in theirs.items()}
    console.print(f"Gates are better in both than {sum(beaten.values())} of {len(beaten)} merges without training.")
    return {"rows": found, "merges": len(beaten), "beaten": sum(beaten.values())}


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a > b for a, b in zip(one, other, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of training the gates (default: %(default)s)")
    parser.add_argument("--size", type=int, default=300, help="samples per exam (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"), help="folder of finished runs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose titles hold this")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    file = args.out / "gates.jsonl"
    sizes = {"steps": args.steps, "size": args.size}
    lines = [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []
    runs = {(line["row"], line["seed"]): line["result"] for line in lines if line["sizes"] == sizes}
    with quiet(), tempfile.TemporaryDirectory() as home:
        for title, settings in [] if args.report else rows():
            for seed in range(args.seeds):
                if args.only in title and (title, seed) not in runs:
                    runs[title, seed] = perform(settings, seed, **sizes, home=Path(home))
                    line = {"row": title, "seed": seed, "sizes": sizes, "result": runs[title, seed]}
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(line) + "\n")
    console = Console(width=120)
    result = report(runs, console)
    console.print(f"gates: {args.steps} steps of Adam at 0.1, {PROMPTS} prompts, {KEEP_SET['samples']} kept answers")
    print(json.dumps({"benchmark": "gates", **sizes, **result}))


if __name__ == "__main__":
    main()
