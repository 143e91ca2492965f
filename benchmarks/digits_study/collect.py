"""The ledger's runs as numbers: means, intervals and paired differences, by world, row and exam."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drift_peft.demo.evaluate import MEASURES

from .intervals import differs, interval
from .ledger import Ledger
from .methods import METHODS
from .plan import SWEEPS, choose, has_prior, stages, test_runs, tuning_runs, validation
from .run import DEFAULTS, scores
from .worlds import WORLDS

Change = Callable[[dict], dict] | None
RIVAL = "lora"  # what a user would do without us: every row is compared with it, seed by seed


def answers(ledger: Ledger, runs: list[dict]) -> dict[str, np.ndarray] | None:
    """Exam -> answers [seeds, samples]; None unless every run is there."""
    if not runs or not all(run in ledger for run in runs):
        return None
    marks = [scores(ledger[run], run["settings"].get("size", DEFAULTS["size"])) for run in runs]
    return {name: np.stack([mark[name] for mark in marks]) for name in MEASURES}


def row(ledger: Ledger, world: str, method: str, change: Change = None, rival: Change = None) -> dict | None:
    """A method's numbers over all seeds, with `rival`'s change made to LoRA beside it; None if a run is missing."""
    runs = test_runs(ledger, world, method, change)
    mine, theirs = answers(ledger, runs), answers(ledger, test_runs(ledger, world, RIVAL, rival))
    if mine is None:
        return None
    together = np.stack([mine[name] for name in MEASURES])
    result = {
        "settings": runs[0]["settings"],
        "edge": at_the_edge(ledger, world, method),
        "scores": {name: interval(mine[name][None]) for name in MEASURES} | {"mean": interval(together)},
    }
    if theirs is not None and method != RIVAL:
        result["against LoRA"] = {name: differs(mine[name][None], theirs[name][None]) for name in MEASURES}
        result["against LoRA"]["mean"] = differs(together, np.stack([theirs[name] for name in MEASURES]))
    results = [ledger[run] for run in runs]
    for key in ("cosine", "absorbed", "step_seconds", "peak_mb"):
        if all(r.get(key) is not None for r in results):
            result[key] = round(float(np.median([r[key] for r in results])), 4)
    if all("loss" in r for r in results):
        result["loss"] = np.round(np.mean([r["loss"] for r in results], axis=0), 4).tolist()
    return result


def at_the_edge(ledger: Ledger, world: str, method: str) -> list[str]:
    """Settings whose chosen value is the smallest or largest candidate: a better one may lie beyond."""
    grid, best, found = METHODS[method].grid, choose(ledger, world, method), []
    for key in grid[0] if grid and best else ():
        values = sorted({candidate[key] for candidate in grid if isinstance(candidate[key], (int, float))})
        if len(values) > 2 and best[key] in (values[0], values[-1]):
            found.append(key)
    return found


def collect(ledger: Ledger) -> dict:
    """Everything that the report shows."""
    planned = {str(run): run for _, stage in stages() for run in stage(ledger)}
    result = {
        "runs": len(ledger),
        "known_missing": sum(run not in ledger for run in planned.values()),
        "hours": round(sum(ledger[run]["seconds"] for run in ledger) / 3600, 2),
        "titles": {key: method.title for key, method in METHODS.items()},
        "worlds": {},
    }
    for world in WORLDS:
        rows = {m: row(ledger, world, m) for m in METHODS if has_prior(world, m)}
        sweeps = {}
        for name, sweep in SWEEPS.items():
            # data and steps change LoRA too: there the rival is LoRA under the same change
            shared = "lora" in sweep.methods
            sweeps[name] = {
                method: {
                    label: found
                    for label, change in sweep.values.items()
                    if (found := row(ledger, world, method, change, change if shared else None))
                }
                for method in sweep.methods
            }
        result["worlds"][world] = {
            "title": WORLDS[world].title,
            "rows": {m: found for m, found in rows.items() if found},
            "tuning": {
                m: {str(run["settings"]): round(validation(ledger, run), 4) for run in tuning_runs(world, m)}
                for m in METHODS
                if METHODS[m].grid and choose(ledger, world, m) is not None
            },
            "sweeps": {n: {m: v for m, v in s.items() if v} for n, s in sweeps.items() if any(s.values())},
        }
    return result
