"""Which runs make the study, in the order in which they are done: what matters most comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from drift_peft.demo.evaluate import MEASURES

from .keep_sets import VARIETIES
from .ledger import Ledger
from .methods import (
    ANCESTOR,
    COMPUTE,
    CONTROLS,
    KEPT,
    METHODS,
    MORE,
    NF4,
    RANK_32,
    STARTS,
    TEXT,
    TRAINING,
    TRAINING_FREE,
    TUNED_CONTROLS,
    VARIANTS,
)
from .run import DEFAULTS, scores
from .worlds import WORLDS

# By what a method's settings are chosen on validation digits. The paper's benchmarks are all over images.
CRITERIA = {"images": ("2-3 operations", "4-5 operations", "perception"), "all": tuple(MEASURES)}
ONCE = ("qwen",)  # the world of DRIFT's other variants and PEFT's other starts: the study is to take five hours at most
Change = Callable[[dict], dict] | None  # the method's settings -> what differs
TUNING_SEED = 100


@dataclass(frozen=True)
class Sweep:
    """One setting over several values, everything else as chosen for the method.

    Attributes:
        title: what is varied.
        methods: keys of METHODS.
        values: label -> settings, given the method's chosen ones.
        worlds: where; the five hours do not suffice for everything everywhere.
    """

    title: str
    methods: tuple[str, ...]
    values: dict[str, Callable[[dict], dict]]
    worlds: tuple[str, ...] = ("qwen", "far")

    @classmethod
    def of(cls, title: str, setting: str, values, methods: tuple[str, ...], worlds=("qwen", "far")) -> Sweep:
        return cls(title, methods, {str(v): lambda _, v=v: {setting: v} for v in values}, worlds)


def times(factor: float) -> Callable[[dict], dict]:
    return lambda settings: {"drift_alpha": round(factor * settings["drift_alpha"], 6)}


def of_rate(factor: float) -> Callable[[dict], dict]:
    return lambda settings: {"rate": round(factor * settings["rate"], 6)}


SWEEPS = {
    "rate": Sweep(
        "Learning rate, times the chosen one",
        ("lora", "merge-lora", "drift"),
        {f"×{f:g}": of_rate(f) for f in (0.5, 1, 2)},
        tuple(WORLDS),
    ),
    "steps": Sweep.of(
        "Optimizer steps", "steps", [25, 50, 100, 150, 300], ("lora", "merge-lora", "drift", "full-drift")
    ),
    "strength": Sweep(
        "Strength, times the chosen one",
        ("drift", "decoupled", "hold"),
        {f"×{f:g}": times(f) for f in (0.1, 0.3, 1, 3)},
        tuple(WORLDS),
    ),
    "merged": Sweep.of(
        "λ of the Δ merged beforehand", "merged", [0.2, 0.5, 0.7, 0.9, 1.0, 1.1], ("merge-lora", "hold")
    ),
    "samples": Sweep.of(
        "Training samples", "samples", [25, 50, 100, 200, 400], ("lora", "merge-lora", "drift"), ("qwen",)
    ),
    "rank": Sweep.of("Rank of the adapter", "r", [1, 2, 4, 8, 16], ("lora", "merge-lora", "drift"), ("qwen",)),
    "noise": Sweep.of(
        "Share of wrong chains of thought in the data",
        "noise",
        [0.0, 0.25],
        ("lora", "merge-lora", "drift", "decoupled", "hold"),
    ),
    "modules": Sweep(
        "Where the bias acts (the paper's table 4)",
        ("drift", "decoupled"),
        {
            "attention and MLP": lambda _: {},
            "attention": lambda _: {"drift_modules": ["attn"]},
            "MLP": lambda _: {"drift_modules": ["mlp"]},
            "attention, MLP, norms": lambda _: {"drift_modules": ["attn", "mlp", "norm"]},
        },
        ("qwen",),
    ),
    "ranks": Sweep.of("Rank of Δ, for an adapter of rank 8", "drift_rank", [1, 2, 4, 8, 16, 64], ("drift",), ("qwen",)),
    "schedule": Sweep(
        "Schedule of the strength",
        ("drift",),
        {
            "constant": lambda _: {},
            "up over 50 steps": lambda _: {"drift_warmup_steps": 50},
            "down to 0 over 150 steps": lambda _: {"drift_decay_steps": 150},
            "down to 0 over 50 steps": lambda _: {"drift_decay_steps": 50},
        },
        ("qwen",),
    ),
    "keep_weight": Sweep.of("Weight of keeping", "keep_weight", [0.3, 1.0, 3.0, 10.0], ("drift-ancestor-keep",), ONCE),
    "keep_batch_size": Sweep.of(
        "Kept answers a step", "keep_batch_size", [4, 8, 16], ("lora-keep", "drift-ancestor-keep"), ONCE
    ),
    "keep_every": Sweep.of(
        "Keeping at every n-th step", "keep_every", [1, 2, 4, 8], ("lora-keep", "drift-ancestor-keep"), ONCE
    ),
    "keep_images": Sweep.of(
        "Images of the keep set", "keep_images", [15, 60, 240, 960], ("lora-keep", "drift-ancestor-keep")
    ),
    "keep_variety": Sweep.of(
        "What the keep set shows and asks", "keep_variety", list(VARIETIES), ("drift-ancestor-keep",)
    ),
    "keep_top_k": Sweep.of(
        "Stored probabilities of a token", "keep_top_k", [1, 2, 4, 8, 16], ("drift-ancestor-keep",), ONCE
    ),
    "keep_steps": Sweep.of(
        "Optimizer steps, keeping",
        "steps",
        [50, 150, 300],
        ("lora-keep", "merge-lora-ancestor-keep", "drift-keep", "drift-ancestor-keep"),
        ONCE,
    ),
    "keep_rank": Sweep.of(  # is it the rank that holds DRIFT back where merging all of Δ is better?
        "Rank of the adapter, keeping",
        "r",
        [8, 16, 32],
        ("merge-lora-ancestor-keep", "drift-ancestor-keep"),
        ("llava",),
    ),
}


@dataclass(frozen=True)
class Plan:
    """The whole study, or a part of it in smaller sizes.

    Attributes:
        worlds, methods, sweeps: keys of what is run.
        seeds: how many, from 0; tuning has one of its own.
        tuning_size: samples per exam on validation digits.
        changes: settings of every run, to make it smaller.
    """

    worlds: tuple[str, ...] = tuple(WORLDS)
    methods: tuple[str, ...] = tuple(METHODS)
    sweeps: tuple[str, ...] = tuple(SWEEPS)
    seeds: int = 5
    tuning_size: int = 150
    changes: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Samples per exam on test digits."""
        return self.changes.get("size", DEFAULTS["size"])

    def tuning_runs(self, world: str, method: str) -> list[dict]:
        common = {"world": world, "method": method, "seed": TUNING_SEED, "split": "validation"}
        changes = self.changes | {"size": self.tuning_size}
        return [common | {"settings": candidate | changes} for candidate in METHODS[method].grid]

    def choose(self, ledger: Ledger, world: str, method: str, criterion: str = "images") -> dict | None:
        """The candidate that is best on validation digits, by the mean of the criterion's exams; None as long as one is
        missing."""
        if METHODS[method].like is not None:
            return self.choose(ledger, world, METHODS[method].like, criterion)
        runs = self.tuning_runs(world, method)
        if not all(run in ledger for run in runs):
            return None
        candidates = zip(METHODS[method].grid, runs, strict=True)
        return max(candidates, key=lambda pair: self.validation(ledger, pair[1], criterion))[0] if runs else {}

    def validation(self, ledger: Ledger, run: dict, criterion: str = "images") -> float:
        """Mean of the criterion's exams, or of those that the method is chosen by."""
        right, exams = scores(ledger[run], self.tuning_size), METHODS[run["method"]].chosen_by or CRITERIA[criterion]
        return sum(right[name].mean() for name in exams) / len(exams)

    def test_runs(
        self, ledger: Ledger, world: str, method: str, change: Change = None, criterion: str = "images"
    ) -> list[dict]:
        """The runs of a row, one for each seed; none as long as the method is not tuned."""
        best = self.choose(ledger, world, method, criterion)
        if best is None:
            return []
        fixed = METHODS[method].settings | (METHODS[method].drift or {})
        settings = best | self.changes | (change(fixed | best) if change else {})
        plain = DEFAULTS | fixed  # left out, so that one run serves several tables
        settings = {key: value for key, value in settings.items() if key not in plain or plain[key] != value}
        common = {"world": world, "method": method, "split": "test", "settings": settings}
        return [common | {"seed": seed} for seed in range(self.seeds)]

    def has(self, world: str, method: str) -> bool:
        """Is this method planned in this world, and the expert there that its prior is made from?"""
        if method in VARIANTS | STARTS and world not in ONCE:
            return False
        prior = METHODS[method].prior
        there = prior not in ("wrong", "weak") or getattr(WORLDS[world], prior) is not None
        return world in self.worlds and method in self.methods and there

    def sweeps_in(self, world: str, name: str) -> bool:
        return name in self.sweeps and world in SWEEPS[name].worlds

    def stages(self) -> Iterator[tuple[str, Callable[[Ledger], list[dict]]]]:
        """(title, ledger -> runs), in order: what later ones are depends on what earlier ones have found."""

        def tuning(world, methods):
            present = [m for m in methods if self.has(world, m)]
            return f"{world}: tuning", lambda _: [run for m in present for run in self.tuning_runs(world, m)]

        def seeds(title, world, methods, criterion="images"):
            present = [m for m in methods if self.has(world, m)]
            return (
                f"{world}: {title}",
                lambda ledger: [run for m in present for run in self.test_runs(ledger, world, m, criterion=criterion)],
            )

        def sweep(name, world):
            present = [m for m in SWEEPS[name].methods if self.has(world, m)]
            values = SWEEPS[name].values.values()
            return (
                f"{world}: {name}",
                lambda ledger: [run for m in present for v in values for run in self.test_runs(ledger, world, m, v)],
            )

        def compared(title, world, methods):
            yield tuning(world, methods)
            yield seeds(title, world, methods)

        for world in self.worlds:
            yield tuning(world, TRAINING_FREE | TRAINING)
            for criterion in CRITERIA:
                yield seeds(f"methods, chosen by {criterion}", world, TRAINING_FREE | TRAINING, criterion)
        for world in self.worlds:
            yield from compared("ancestor", world, ANCESTOR)
        for world in self.worlds:
            yield from compared("keeping", world, KEPT)
        for world in self.worlds:
            yield from compared("controls, tuned", world, TUNED_CONTROLS)
        for world in self.worlds:
            yield from compared("keeping, rank 32", world, RANK_32)
            yield from compared("keeping, more images", world, MORE)
        for world in self.worlds:
            yield seeds("keeping, chosen by all", world, KEPT | TUNED_CONTROLS, "all")
        for world in self.worlds:
            yield seeds("as long as keeping takes", world, COMPUTE)
            yield from compared("text chains alone", world, TEXT)
        for name in (name for name in SWEEPS if name.startswith("keep_")):
            yield from (sweep(name, world) for world in self.worlds if self.sweeps_in(world, name))
        for world in self.worlds:
            yield seeds("controls", world, CONTROLS)
            yield from (sweep(name, world) for name in ("strength", "rate") if self.sweeps_in(world, name))
        for world in self.worlds:
            yield seeds("NF4", world, NF4)
            if self.sweeps_in(world, "merged"):
                yield sweep("merged", world)
        for world in self.worlds:
            yield from compared("variants", world, VARIANTS)
            yield from (sweep(n, world) for n in ("modules", "schedule", "ranks") if self.sweeps_in(world, n))
        for name in ("steps", "rank"):
            yield from (sweep(name, world) for world in self.worlds if self.sweeps_in(world, name))
        for world in self.worlds:
            yield from compared("starts", world, STARTS)
        for name in ("samples", "noise"):
            yield from (sweep(name, world) for world in self.worlds if self.sweeps_in(world, name))


FULL = Plan()
SMALL = ("vlm", "swap", "lora", "merge-lora", "drift", "decoupled", "hold")
QUICK = Plan(("qwen",), SMALL, (), seeds=2, tuning_size=100, changes={"steps": 50, "size": 100})
SMALLEST = Plan(
    ("qwen",),
    ("vlm", "lora", "drift"),
    ("strength",),
    seeds=2,
    tuning_size=2,
    changes={"steps": 1, "samples": 4, "size": 2},
)
