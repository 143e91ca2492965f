"""Which runs make the study, in the order in which they are done: tuning, seeds, then one setting after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from drift_peft.demo.evaluate import MEASURES

from .ledger import Ledger
from .methods import CONTROLS, METHODS, NF4, TRAINING, TRAINING_FREE, VARIANTS
from .run import DEFAULTS, scores
from .worlds import WORLDS

SEEDS = range(5)
TUNING_SEED, TUNING_SIZE = 100, 150
STEERED = ("lora", "merge-lora", "drift", "decoupled", "hold")


@dataclass(frozen=True)
class Sweep:
    """One setting over several values, everything else as chosen for the method.

    Attributes:
        title: what is varied.
        methods: keys of METHODS.
        values: label -> settings, given the method's chosen ones.
    """

    title: str
    methods: tuple[str, ...]
    values: dict[str, Callable[[dict], dict]]

    @classmethod
    def of(cls, title: str, setting: str, values, methods: tuple[str, ...] = STEERED) -> Sweep:
        return cls(title, methods, {str(v): lambda _, v=v: {setting: v} for v in values})


def times(factor: float) -> Callable[[dict], dict]:
    return lambda settings: {"drift_alpha": round(factor * settings["drift_alpha"], 6)}


def ranks(adapter: int, prior: int) -> Callable[[dict], dict]:
    return lambda _: {"r": adapter, "drift_rank": prior}


SWEEPS = {
    "steps": Sweep.of("Optimizer steps", "steps", [25, 50, 100, 150, 300], (*STEERED, "full", "full-drift")),
    "strength": Sweep(
        "Strength, times the chosen one",
        ("drift", "decoupled", "hold"),
        {f"×{f:g}": times(f) for f in (0.1, 0.3, 1, 3)},
    ),
    "merged": Sweep.of("λ of the Δ merged beforehand", "merged", [0.7, 0.8, 0.9, 1.0, 1.1], ("merge-lora", "hold")),
    "samples": Sweep.of("Training samples", "samples", [25, 50, 100, 200, 400]),
    "rank": Sweep.of("Rank of the adapter", "r", [1, 2, 4, 8, 16]),
    "noise": Sweep.of("Share of wrong chains of thought in the data", "noise", [0.0, 0.25]),
    "modules": Sweep(
        "Where the bias acts (the paper's table 4)",
        ("drift", "decoupled"),
        {
            "attention and MLP": lambda _: {},
            "attention": lambda _: {"drift_modules": ["attn"]},
            "MLP": lambda _: {"drift_modules": ["mlp"]},
            "attention, MLP, norms": lambda _: {"drift_modules": ["attn", "mlp", "norm"]},
        },
    ),
    "ranks": Sweep(
        "Rank of the adapter, rank of Δ",
        ("drift",),
        {f"{r}, {k}": ranks(r, k) for r in (2, 8) for k in (1, 2, 4, 8, 16, 64)},
    ),
    "schedule": Sweep(
        "Schedule of the strength",
        ("drift",),
        {
            "constant": lambda _: {},
            "up over 50 steps": lambda _: {"drift_warmup_steps": 50},
            "down to 0 over 150 steps": lambda _: {"drift_decay_steps": 150},
            "down to 0 over 50 steps": lambda _: {"drift_decay_steps": 50},
        },
    ),
}


def tuning_runs(world: str, method: str) -> list[dict]:
    return [
        {
            "world": world,
            "method": method,
            "seed": TUNING_SEED,
            "split": "validation",
            "settings": candidate | {"size": TUNING_SIZE},
        }
        for candidate in METHODS[method].grid
    ]


def choose(ledger: Ledger, world: str, method: str) -> dict | None:
    """The candidate with the best mean of the four exams on validation digits; None as long as one is missing."""
    if METHODS[method].like is not None:
        return choose(ledger, world, METHODS[method].like)
    runs = tuning_runs(world, method)
    if not runs:
        return {}
    if not all(run in ledger for run in runs):
        return None
    best = max(runs, key=lambda run: validation(ledger, run))
    return {key: value for key, value in best["settings"].items() if key != "size"}


def validation(ledger: Ledger, run: dict) -> float:
    right = scores(ledger[run], TUNING_SIZE)
    return sum(right[name].mean() for name in MEASURES) / len(MEASURES)


def test_runs(ledger: Ledger, world: str, method: str, change: Callable[[dict], dict] | None = None) -> list[dict]:
    """The runs of a row, a seed each; none as long as the method is not tuned."""
    settings = choose(ledger, world, method)
    if settings is None:
        return []
    known = METHODS[method].settings | (METHODS[method].drift or {}) | settings
    settings = settings | (change(known) if change else {})
    plain = DEFAULTS | METHODS[method].settings
    settings = {key: value for key, value in settings.items() if key not in plain or plain[key] != value}
    return [{"world": world, "method": method, "seed": seed, "split": "test", "settings": settings} for seed in SEEDS]


def has_prior(world: str, method: str) -> bool:
    prior = METHODS[method].prior
    return prior not in ("wrong", "weak") or getattr(WORLDS[world], prior) is not None


def stages() -> Iterator[tuple[str, Callable[[Ledger], list[dict]]]]:
    """(title, ledger -> runs), in order: what later ones are depends on what earlier ones have found."""

    def tuning(world, methods):
        return f"{world}: tuning", lambda _: [run for m in methods for run in tuning_runs(world, m)]

    def seeds(title, world, methods):
        present = [m for m in methods if has_prior(world, m)]
        return f"{world}: {title}", lambda ledger: [run for m in present for run in test_runs(ledger, world, m)]

    def sweep(name, world):
        def runs(ledger):
            values = SWEEPS[name].values.values()
            return [run for m in SWEEPS[name].methods for v in values for run in test_runs(ledger, world, m, v)]

        return f"{world}: {name}", runs

    first = TRAINING_FREE | TRAINING
    for world in WORLDS:
        yield tuning(world, first)
        yield seeds("methods", world, first)
    for world in WORLDS:
        yield sweep("steps", world)
        yield sweep("strength", world)
        yield seeds("controls", world, CONTROLS)
        yield seeds("NF4", world, NF4)
    for world in WORLDS:
        yield sweep("merged", world)
        yield sweep("rank", world)
        yield tuning(world, VARIANTS)
        yield seeds("variants", world, VARIANTS)
    for name in ("samples", "noise", "modules", "ranks", "schedule"):
        for world in WORLDS:
            yield sweep(name, world)
