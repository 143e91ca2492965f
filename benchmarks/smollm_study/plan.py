"""Which runs there are, in the order in which they are done: the rows that matter most come first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from digits_study.run import unmarked
from ledger import Ledger

from .make import CHECKPOINTS
from .precision import NF4
from .run import BATCH, DEFAULTS, PRIOR_RANK
from .ways import SWEEPS, WAYS
from .world import PERCEPTION

IMAGES = ("2-3 operations", "4-5 operations", "perception")  # by whose mean settings are chosen
TUNING_SEED = 100


@dataclass(frozen=True)
class Plan:
    """The whole study, or a part of it in smaller sizes.

    Attributes:
        sweeps: way -> changes of the settings that were chosen for it, each tried on validation samples afterwards.
        changes: settings of every run.
    """

    ways: tuple[str, ...] = tuple(WAYS)
    sweeps: dict = field(default_factory=lambda: SWEEPS)
    seeds: int = 3
    tuning_size: int = 50
    changes: dict = field(default_factory=dict)

    def size(self, run: dict) -> int:
        return (DEFAULTS | run["settings"])["size"]

    def tuning_runs(self, way: str) -> list[dict]:
        return [self.on_validation(way, candidate) for candidate in WAYS[way].grid]

    def on_validation(self, way: str, settings: dict) -> dict:
        given = {"size": self.tuning_size} | self.changes
        return {"way": way, "seed": TUNING_SEED, "split": "validation", "settings": given | settings}

    def choose(self, ledger: Ledger, way: str) -> dict | None:
        """The best candidate on validation samples; None as long as one is missing."""
        runs = self.tuning_runs(way)
        if not all(run in ledger for run in runs):
            return None
        best = max(
            zip(WAYS[way].grid, runs, strict=True), key=lambda pair: self.mean(ledger, pair[1]), default=({}, None)
        )
        return best[0]

    def mean(self, ledger: Ledger, run: dict) -> float:
        found = scores(ledger[run], self.size(run))
        return float(np.mean([found[name].mean() for name in IMAGES]))

    def test_runs(self, ledger: Ledger, way: str) -> list[dict]:
        best = self.choose(ledger, way)
        if best is None:
            return []
        return [
            {"way": way, "seed": seed, "split": "test", "settings": best | self.changes} for seed in range(self.seeds)
        ]

    def swept_runs(self, ledger: Ledger, way: str) -> list[dict]:
        """On validation samples: the settings that were chosen, each time with a change."""
        best = self.choose(ledger, way)
        if best is None:
            return []
        return [self.on_validation(way, best | change) for change in self.sweeps.get(way, ())]

    def missing(self, ledger: Ledger) -> Iterator[dict]:
        """What is still to be run: of each way its candidates, then its seeds; what is changed afterwards is last."""
        for way in self.ways:
            for stage in (lambda _, way=way: self.tuning_runs(way), partial(self.test_runs, way=way)):
                yield from (run for run in stage(ledger) if run not in ledger)
        for way in self.ways:
            yield from (run for run in self.swept_runs(ledger, way) if run not in ledger)


def scores(result: dict, size: int) -> dict[str, np.ndarray]:
    """Exam -> answers [size]; `perception` is the mean of its kinds, sample by sample."""
    answers = {name: unmarked(text, size) for name, text in result["answers"].items()}
    return {**answers, "perception": np.mean([answers[kind] for kind in PERCEPTION], axis=0)}


def open_ledger(file: Path, folder: Path | None) -> Ledger:
    """Runs of other checkpoints than their way uses now, or of a way that was something else, are refused.

    Args:
        folder: of the checkpoints, as far as they are made; None if the runs are only to be read.
    """
    files = {name: folder / name / "model.safetensors" for name in CHECKPOINTS} if folder else {}
    weights = {name: hashlib.sha256(each.read_bytes()).digest() for name, each in files.items() if each.exists()}

    def made_of(run: dict) -> dict[str, str]:
        way = WAYS[run["way"]]
        fixed = {key: value for key, value in vars(way).items() if key not in ("title", "grid")}
        settings = json.dumps([fixed, DEFAULTS, BATCH, PRIOR_RANK, NF4.to_dict()], sort_keys=True, default=str)
        checkpoints = b"".join(weights.get(name, b"") for name in way.checkpoints)
        parts = {"checkpoints": checkpoints, "way": settings.encode()}
        return {name: hashlib.sha256(part).hexdigest()[:16] for name, part in parts.items()}

    def stale(run: dict, entry: dict) -> str | None:
        if run["way"] not in WAYS or entry["way"] != made_of(run)["way"]:
            return f"when the way {run['way']!r} was something else: remove its lines"
        if folder is None:
            return None
        if missing := [name for name in WAYS[run["way"]].checkpoints if name not in weights]:
            return f"on checkpoints that {folder} lacks ({', '.join(missing)}): put them there"
        if entry["checkpoints"] != made_of(run)["checkpoints"]:
            return f"on other checkpoints than those in {folder}: put its own there"
        return None

    return Ledger(file, made_of, stale, "--ledger another file")


FULL = Plan()
SMALLEST = Plan(
    ("vlm", "gates", "lora-keep", "drift-ancestor-keep"),
    {"drift-ancestor-keep": ({"drift_alpha": 1.0}, {"scale": 0.5})},
    1,
    2,
    {"steps": 1, "gate_steps": 1, "samples": 4, "size": 2, "keep_images": 4, "r": 2},
)
