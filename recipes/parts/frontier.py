"""Task against keeping: what was measured, which ways nothing beats in both, which one to take, and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from drift_peft.atomic import write

from .intervals import interval


@dataclass(frozen=True)
class Measured:
    """One way on the samples that were held out.

    Attributes:
        right: of each sample, the share of the seeds whose answer is right [samples].
        kl: of each answer of the keep set, KL(VLM || model) in nats a token, mean over the seeds [answers]; None if
            there is no keep set.
        agreement: likewise, the share of tokens that the model would have chosen too.
        categories: of each sample.
        facts: numbers of the training, if there was one: steps, and minutes, which are None where they are not known.
    """

    right: np.ndarray
    kl: np.ndarray | None = None
    agreement: np.ndarray | None = None
    categories: list[str] = field(default_factory=list)
    facts: dict[str, float | None] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return 0.0 if self.kl is None else float(self.kl.mean())


def read_measured(folders: list[Path], kept: bool, facts: list[dict[str, float | None]]) -> Measured:
    """What the runs of a way have answered, mean over them; a fact that is not known of each is not known."""

    def mean(file: str, *keys: str) -> np.ndarray:
        values = []
        for folder in folders:
            rows = json.loads((folder / file).read_text(encoding="utf-8"))
            for key in keys[:-1]:
                rows = rows[key]
            values.append([row[keys[-1]] for row in rows])
        return np.array(values, float).mean(0)

    samples = json.loads((folders[0] / "right.json").read_text(encoding="utf-8"))["samples"]
    distances = {key: mean("kept.json", "answers", "model", key) for key in ("kl", "agreement") if kept}
    values = {key: [each[key] for each in facts] for key in facts[0]}
    averages = {key: None if None in each else float(np.mean(each)) for key, each in values.items()}
    categories = [sample["category"] for sample in samples]
    return Measured(mean("right.json", "samples", "correct"), **distances, categories=categories, facts=averages)


def frontier(measured: dict[str, Measured]) -> list[str]:
    """The ways that no other one beats: at least as good in both, and better in one."""

    def beats(one: Measured, other: Measured) -> bool:
        gains = (one.right.mean() - other.right.mean(), other.cost - one.cost)
        return min(gains) >= 0 and max(gains) > 0

    return [name for name, way in measured.items() if not any(beats(other, way) for other in measured.values())]


def choose(measured: dict[str, Measured], budget: float | None = None) -> str | None:
    """The way to take: of those that these samples cannot tell from the best one, the one that keeps most.

    The best one has the most right answers. Another one can be told from it if the 95 % interval of their paired
    difference is above 0.

    Args:
        budget: most that a way may cost, in nats a token. If all cost more, there is none to take.
    """
    allowed = {name: way for name, way in measured.items() if budget is None or way.cost <= budget}
    if not allowed:
        return None
    best = max(allowed, key=lambda name: (allowed[name].right.mean(), -allowed[name].cost))
    alike = [
        name for name, way in allowed.items()
        if name == best or interval(allowed[best].right - way.right)[0] <= 0
    ]  # fmt: skip
    return min(alike, key=lambda name: (allowed[name].cost, -allowed[name].right.mean()))


def over_budget(what: str, costs: Iterable[float], budget: float) -> str:
    """What is to be said where there is none to take."""
    return f"no {what} costs at most {budget:g} nats a token: the least is {min(costs):.3g}"


def draw(measured: dict[str, Measured], titles: dict[str, str], choice: str | None, output: Path) -> None:
    """A line for each way, the best on top: right answers, and beside them the cost in keeping, with their intervals.

    The ways of the frontier are filled, the others hollow; the choice is a star. Made to be read 830 pixels wide.
    """
    best = frontier(measured)
    order = sorted(measured, key=lambda name: (measured[name].right.mean(), -measured[name].cost))
    figure = Figure(figsize=(8.3, 1.1 + 0.32 * len(order)), dpi=160, layout="constrained")
    right, cost = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(order):
        way = measured[name]
        look = {"fmt": "*", "ms": 12} if name == choice else {"fmt": "o", "ms": 6}
        look |= {"color": "#0072b2" if name in best else "#999999", "mfc": None if name in best else "white", "lw": 1}
        for axes, values in ((right, 100 * way.right), (cost, way.kl)):
            middle = values.mean()
            low, high = interval(values)
            axes.errorbar(middle, place, xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]], **look)  # rounding
    right.set_yticks(range(len(order)), [titles[name] for name in order])
    right.set_xlabel("right answers, %", fontsize=9)
    cost.set_xscale("symlog", linthresh=0.1)
    cost.set_xlim(left=-0.01)
    cost.xaxis.set_major_formatter("{x:g}")
    cost.set_xlabel("distance from the VLM's answers, nats a token", fontsize=9)
    for axes in (right, cost):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("filled: nothing beats it in both; star: the choice", fontsize=9)
    write(output, lambda unfinished: figure.savefig(unfinished, format=output.suffix[1:]))
