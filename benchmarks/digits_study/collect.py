"""The ledger's runs as numbers: means, intervals and paired differences, by world, row and exam."""

from __future__ import annotations

import numpy as np
from ledger import key_of

from drift_peft.demo.evaluate import MEASURES

from .intervals import interval
from .ledger import Ledger
from .methods import METHODS, MORE, RANK_32, VARIANTS
from .plan import CRITERIA, SWEEPS, Change, Plan
from .run import scores
from .worlds import WORLDS

DUELS = (  # (first, second, what their difference answers)
    ("drift", "vlm", "What training changes in all:"),
    ("lora", "vlm", ""),
    ("drift", "lora", "Is DRIFT better than LoRA?"),
    ("decoupled", "lora", "And decoupled?"),
    ("drift", "start", "Is it more than the start?"),
    ("drift", "merge-lora", "Better than merging, then LoRA?"),
    ("decoupled", "merge-lora", ""),
    ("hold", "merge-lora", "Held, or left free (each with its own λ)?"),
    ("hold", "drift", "Held near a merged VLM, or steered inside the adapter?"),
    ("decoupled", "drift", "Outside the gradient or in it?"),
    ("drift", "full", "Better than full fine-tuning?"),
    ("drift", "full-drift", "Better than DRIFT as published?"),
    ("full-drift", "full", "What the published way gains:"),
    ("drift", "drift-random", "Is it Δ, or any pull with DRIFT's settings?"),
    ("decoupled", "decoupled-random", ""),
    ("drift", "drift-negated", ""),
    ("drift", "drift-random-tuned", "Is it Δ, or any pull that is tuned as well?"),
    ("drift-keep", "drift-random-keep", "And with keeping in both:"),
    ("drift-keep", "pull-to-zero-keep", ""),
    ("drift-ancestor", "drift-random-tuned", ""),
    ("drift-random-tuned", "lora", "What any pull gains:"),
    ("drift-random-keep", "lora-keep", "And with keeping in both:"),
    ("pull-to-zero-keep", "lora-keep", ""),
    ("drift", "drift-wrong", "Does the expert matter?"),
    ("decoupled", "decoupled-wrong", ""),
    ("decoupled", "pull-to-zero", "More than a pull to zero?"),
    ("drift-hierarchical", "drift", "Δ from the ancestor, or from the VLM?"),
    ("decoupled-hierarchical", "decoupled", ""),
    ("drift-ancestor", "merge-lora-ancestor", "Both with Δ from the ancestor, each tuned:"),
    ("drift-ancestor", "merge-lora", ""),
    ("drift", "merge-lora-ancestor", ""),
    ("merge-lora-ancestor", "merge-lora", ""),
    ("drift-ancestor", "drift", "Δ from the ancestor, tuned too:"),
    ("drift-start-ancestor", "merge-lora-ancestor", "A part of Δ in the adapter, or merged first?"),
    ("drift-start-ancestor", "drift-ancestor", ""),
    ("drift-start-ancestor", "lora", ""),
    ("drift-keep", "drift", "What keeping adds to DRIFT:"),
    ("drift-ancestor-keep", "drift-ancestor", ""),
    ("lora-keep", "lora", "And to its rivals:"),
    ("merge-lora-keep", "merge-lora", ""),
    ("merge-lora-ancestor-keep", "merge-lora-ancestor", ""),
    ("full-keep", "full", ""),
    ("full-drift-keep", "full-drift", ""),
    ("full-keep", "lora-keep", "Kept, all weights, or LoRA?"),
    ("drift-ancestor-keep", "drift-keep", "Kept, Δ from the ancestor, or from the VLM?"),
    ("drift-keep", "lora-keep", "Both kept:"),
    ("drift-ancestor-keep", "lora-keep", ""),
    ("drift-keep", "merge-lora-keep", ""),
    ("drift-keep", "merge-lora-ancestor-keep", ""),
    ("drift-ancestor-keep", "merge-lora-keep", ""),
    ("drift-ancestor-keep", "merge-lora-ancestor-keep", ""),
    ("drift-keep", "full-drift-keep", ""),
    ("merge-drift-ancestor-keep", "merge-lora-ancestor-keep", "Kept, merged first: then DRIFT, or LoRA?"),
    ("merge-drift-ancestor-keep", "drift-ancestor-keep", ""),
    ("merge-drift-ancestor-keep", "lora-keep", ""),
    ("hold-ancestor-keep", "merge-lora-ancestor-keep", "Kept, merged first: held, or left free?"),
    ("hold-ancestor-keep", "merge-drift-ancestor-keep", ""),
    ("hold-ancestor-keep", "drift-ancestor-keep", ""),
    ("hold-ancestor-keep", "lora-keep", ""),
    ("drift-guide-ancestor-keep", "drift-ancestor-keep", "Kept, PEFT's start of the adapter, or DRIFT's?"),
    ("drift-guide-ancestor-keep", "lora-keep", ""),
    ("drift-start-ancestor-keep", "merge-lora-ancestor-keep", "Kept, a part of Δ in the adapter, or merged first?"),
    ("drift-start-ancestor-keep", "drift-ancestor-keep", ""),
    ("drift-start-ancestor-keep", "lora-keep", ""),
    ("drift-start-ancestor-keep", "hold-ancestor-keep", ""),
    ("drift-start-keep", "merge-lora-keep", "And with Δ from the VLM:"),
    ("drift-start-keep", "drift-keep", ""),
    ("drift-start-keep", "lora-keep", ""),
    ("drift-start-ancestor-keep", "drift-start-keep", "Kept, Δ from the ancestor, or from the VLM?"),
    ("drift-start-ancestor-keep-32", "merge-lora-ancestor-keep-32", "And with adapters of rank 32:"),
    ("drift-start-ancestor-keep-32", "merge-lora-ancestor-keep", ""),
    ("drift-start-ancestor-keep-32", "drift-start-ancestor-keep", "Rank 32, or 8?"),
    ("drift-start-ancestor-keep-32", "drift-ancestor-keep", ""),
    ("merge-lora-ancestor-keep-32", "merge-lora-ancestor-keep", ""),
    ("drift-keep-more", "drift-keep", "Kept by 960 images, or by 240?"),
    ("drift-ancestor-keep-more", "drift-ancestor-keep", ""),
    ("lora-keep-more", "lora-keep", ""),
    ("merge-lora-keep-more", "merge-lora-keep", ""),
    ("merge-lora-ancestor-keep-more", "merge-lora-ancestor-keep", ""),
    ("drift-keep-more", "lora-keep-more", "All kept by 960 images:"),
    ("drift-ancestor-keep-more", "lora-keep-more", ""),
    ("drift-keep-more", "merge-lora-keep-more", ""),
    ("drift-keep-more", "merge-lora-ancestor-keep-more", ""),
    ("drift-ancestor-keep-more", "merge-lora-keep-more", ""),
    ("drift-ancestor-keep-more", "merge-lora-ancestor-keep-more", ""),
    ("merge-drift-ancestor-keep-more", "merge-lora-ancestor-keep-more", ""),
    ("drift-start-ancestor-keep-more", "merge-lora-ancestor-keep-more", ""),
    ("drift-start-ancestor-keep-more", "drift-ancestor-keep-more", ""),
    ("drift-start-ancestor-keep-more", "hold-ancestor-keep-more", ""),
    ("drift-start-ancestor-keep-more", "drift-start-ancestor-keep", ""),
    ("hold-ancestor-keep-more", "hold-ancestor-keep", ""),
    ("hold-ancestor-keep-more", "merge-lora-ancestor-keep-more", ""),
    ("hold-ancestor-keep-more", "merge-drift-ancestor-keep-more", ""),
    ("hold-ancestor-keep-more", "drift-ancestor-keep-more", ""),
    ("drift-ancestor-keep", "vlm", "What is gained in all:"),
    ("drift-ancestor-keep", "drift-ancestor-replay-240", "Keeping, or replay of as many answers?"),
    ("lora-keep", "lora-replay-240", ""),
    ("merge-lora-ancestor-keep", "merge-lora-ancestor-replay-240", ""),
    ("drift-ancestor-replay-240", "drift-ancestor-replay", "Replay of 240 answers, or of 60?"),
    ("lora-replay-240", "lora-replay", ""),
    ("merge-lora-ancestor-replay-240", "merge-lora-ancestor-replay", ""),
    ("drift-ancestor-keep", "drift-ancestor-longer", "Keeping, or as much more training?"),
    ("lora-keep", "lora-longer", ""),
    ("merge-lora-ancestor-keep", "merge-lora-ancestor-longer", ""),
    ("drift-ancestor-text", "merge-lora-ancestor-text", "Kept, on chains in text alone:"),
    ("drift-ancestor-text", "lora-text", ""),
    ("drift", "drift-weak", "A weaker expert?"),
    ("drift", "drift-nf4", "What 4 bit costs:"),
    ("lora", "lora-nf4", ""),
    *((key, "drift", "") for key in VARIANTS),
)

# DRIFT inside the adapter, whose rivals are listed: those that keep nothing either, and those that keep as much.
LEADERS = {
    "without keeping": ("drift", "decoupled", "drift-ancestor"),
    "keeping": ("drift-keep", "drift-ancestor-keep"),
    "keeping, 960 images": ("drift-keep-more", "drift-ancestor-keep-more"),
}
RIVAL = "lora"  # what a user would do without us: every row is compared with it, seed by seed


def answers(ledger: Ledger, runs: list[dict], size: int) -> np.ndarray | None:
    """Right answers [exams, seeds, samples], exams in the order of MEASURES; None unless every run is there."""
    if not runs or not all(run in ledger for run in runs):
        return None
    marks = [scores(ledger[run], size) for run in runs]
    return np.stack([[mark[name] for mark in marks] for name in MEASURES])


def mean_over(criterion: str, answers: np.ndarray) -> tuple[float, float, float]:
    """Mean and interval over the criterion's exams of answers or paired differences [exams, seeds, samples]."""
    return interval(answers[[i for i, name in enumerate(MEASURES) if name in CRITERIA[criterion]]])


def summary(answers: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Mean and interval of each exam and each criterion."""
    exams = {name: interval(answers[i, None]) for i, name in enumerate(MEASURES)}
    return exams | {criterion: mean_over(criterion, answers) for criterion in CRITERIA}


def row(
    ledger: Ledger,
    plan: Plan,
    world: str,
    method: str,
    criterion: str = "images",
    change: Change = None,
    rival: Change = None,
) -> dict | None:
    """A method's numbers over all seeds, with `rival`'s change made to LoRA beside it; None if a run is missing."""
    runs = plan.test_runs(ledger, world, method, change, criterion)
    mine = answers(ledger, runs, plan.size)
    theirs = answers(ledger, plan.test_runs(ledger, world, RIVAL, rival, criterion), plan.size)
    if mine is None:
        return None
    result = {
        "settings": runs[0]["settings"],
        "edge": at_the_edge(METHODS[method].grid, plan.choose(ledger, world, method, criterion)),
        "scores": summary(mine),
    }
    if theirs is not None and method != RIVAL:
        result["against LoRA"] = summary(mine - theirs)
    results = [ledger[run] for run in runs]
    # Of times and memory the smallest: what else ran on the machine can only add.
    for key, best in (("cosine", np.median), ("absorbed", np.median), ("step_seconds", min), ("peak_mb", min)):
        if all(r.get(key) is not None for r in results):
            result[key] = round(float(best([r[key] for r in results])), 4)
    if all("loss" in r for r in results):
        result["loss"] = np.round(np.mean([r["loss"] for r in results], axis=0), 4).tolist()
    return result


def best_validation(ledger: Ledger, plan: Plan, world: str, method: str, criterion: str) -> float:
    return max(plan.validation(ledger, run, criterion) for run in plan.tuning_runs(world, method))


def at_the_edge(grid: tuple[dict, ...], best: dict) -> list[str]:
    """Settings whose chosen value is the smallest or largest candidate: a better one may lie beyond."""
    found = []
    for key in grid[0] if grid else ():
        values = sorted({candidate[key] for candidate in grid if isinstance(candidate[key], (int, float))})
        if len(values) > 2 and best.get(key) in (values[0], values[-1]):
            found.append(key)
    return found


def collect(ledger: Ledger, plan: Plan) -> dict:
    """Everything that the report shows."""
    planned = {key_of(run): run for _, stage in plan.stages() for run in stage(ledger)}
    done = [run for run in planned.values() if run in ledger]
    candidates = [candidate for method in METHODS.values() for candidate in method.grid]
    return {
        "runs": len(done),
        "known_missing": len(planned) - len(done),
        "not_shown": len(ledger) - len(done),
        "hours": round(sum(ledger[run]["seconds"] for run in done) / 3600, 2),
        "seeds": plan.seeds,
        "size": plan.size,
        "titles": {key: method.title for key, method in METHODS.items()},
        "candidates": {str(c): ", ".join(f"{k} {v}" for k, v in c.items()) for c in candidates},
        "worlds": {world: collect_world(ledger, plan, world) for world in plan.worlds},
    }


def collect_world(ledger: Ledger, plan: Plan, world: str) -> dict:
    methods = [m for m in METHODS if plan.has(world, m)]
    tuned = [m for m in methods if METHODS[m].grid and plan.choose(ledger, world, m) is not None]
    return {
        "title": WORLDS[world].title,
        "chosen by": {criterion: compare(ledger, plan, world, methods, criterion) for criterion in CRITERIA},
        "tuning": {
            m: {
                str(candidate): {c: round(plan.validation(ledger, run, c), 4) for c in CRITERIA}
                for candidate, run in zip(METHODS[m].grid, plan.tuning_runs(world, m), strict=True)
            }
            for m in tuned
        },
        "merging": {m: by_scale(ledger, plan, world, m) for m in ("task-arithmetic", "export") if m in tuned},
        "sweeps": sweep(ledger, plan, world, methods),
    }


def compare(ledger: Ledger, plan: Plan, world: str, methods: list[str], criterion: str) -> dict:
    """Rows, duels and the leaders' rivals, all with settings chosen by this criterion and compared by it."""
    rows = {m: found for m in methods if (found := row(ledger, plan, world, m, criterion))}
    done = {m: answers(ledger, plan.test_runs(ledger, world, m, criterion=criterion), plan.size) for m in rows}

    def difference(a: str, b: str) -> tuple[float, float, float]:
        return mean_over(criterion, done[a] - done[b])

    def led(leaders: tuple[str, ...]) -> dict:
        there = [m for m in leaders if m in rows]
        leader = max(there, key=lambda m: best_validation(ledger, plan, world, m, criterion), default=None)
        alike = [m for m in done if leader and m != leader and keeps(m) == keeps(leader)]
        return {"leader": leader, "leads": {m: difference(m, leader) for m in alike}}

    return {
        "rows": rows,
        "duels": {f"{a} {b}": difference(a, b) for a, b, _ in DUELS if a in done and b in done},
        "leaders": {kind: led(leaders) for kind, leaders in LEADERS.items()},
    }


def keeps(method: str) -> tuple[bool, bool, bool]:
    """Whether it keeps what the VLM can do, by more images than the others, and with a larger adapter."""
    return bool(METHODS[method].kept), method in MORE, method in RANK_32


def sweep(ledger: Ledger, plan: Plan, world: str, methods: list[str]) -> dict:
    """Sweep -> method -> value -> row, with its difference from the chosen value; what has not been run is left out."""
    result = {}

    def against_chosen(method: str, change: Change) -> tuple[float, float, float] | None:
        found = [answers(ledger, plan.test_runs(ledger, world, method, c), plan.size) for c in (change, None)]
        return mean_over("images", found[0] - found[1]) if found[1] is not None else None

    for name in filter(lambda name: plan.sweeps_in(world, name), plan.sweeps):
        found = {}
        for method in filter(methods.__contains__, SWEEPS[name].methods):
            # data and steps change LoRA too: there the rival is LoRA under the same change
            shared = RIVAL in SWEEPS[name].methods
            values = {
                label: row(ledger, plan, world, method, change=change, rival=change if shared else None)
                for label, change in SWEEPS[name].values.items()
            }
            found[method] = {label: value for label, value in values.items() if value}
            for label, value in found[method].items():
                value["against chosen"] = against_chosen(method, SWEEPS[name].values[label])
        found = {method: values for method, values in found.items() if len(values) > 1}  # one alone varies nothing
        if found:
            result[name] = found
    return result


def by_scale(ledger: Ledger, plan: Plan, world: str, method: str) -> dict[str, tuple[float, float]]:
    """λ -> mean of the exams over images, and of that over text, on validation digits."""
    found = {}
    for candidate, run in zip(METHODS[method].grid, plan.tuning_runs(world, method), strict=True):
        right = {name: float(answers.mean()) for name, answers in scores(ledger[run], plan.tuning_size).items()}
        text = right.pop("text reasoning")
        found[f"{candidate['scale']:g}"] = (round(sum(right.values()) / len(right), 4), round(text, 4))
    return found
