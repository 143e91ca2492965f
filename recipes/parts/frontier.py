"""Task against keeping: which ways nothing beats in both, which one to take, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

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
        facts: numbers of the training, if there was one: steps and minutes.
    """

    right: np.ndarray
    kl: np.ndarray | None = None
    agreement: np.ndarray | None = None
    categories: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return 0.0 if self.kl is None else float(self.kl.mean())


def frontier(measured: dict[str, Measured]) -> list[str]:
    """The ways that no other one beats: at least as good in both, and better in one."""

    def beats(one: Measured, other: Measured) -> bool:
        gains = (one.right.mean() - other.right.mean(), other.cost - one.cost)
        return min(gains) >= 0 and max(gains) > 0

    return [name for name, found in measured.items() if not any(beats(other, found) for other in measured.values())]


def choose(measured: dict[str, Measured], budget: float | None = None) -> str:
    """The way to take: of those that these samples cannot tell from the best one, the one that keeps most.

    The best one has the most right answers. Another one can be told from it if the 95 % interval of their paired
    difference is above 0.

    Args:
        budget: most that a way may cost, in nats a token.

    Raises:
        ValueError: all cost more.
    """
    allowed = {name: found for name, found in measured.items() if budget is None or found.cost <= budget}
    if not allowed:
        least = min(found.cost for found in measured.values())
        raise ValueError(f"no way costs at most {budget:g} nats a token: the least is {least:.3g}")
    best = max(allowed, key=lambda name: (allowed[name].right.mean(), -allowed[name].cost))
    alike = [
        name for name, found in allowed.items()
        if name == best or interval(allowed[best].right - found.right)[0] <= 0
    ]  # fmt: skip
    return min(alike, key=lambda name: (allowed[name].cost, -allowed[name].right.mean()))


def draw(measured: dict[str, Measured], titles: dict[str, str], choice: str, output: Path) -> None:
    """Right answers over the cost in keeping, each with its interval; the frontier as a line, the choice as a star."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(measured.items()):
        right = 100 * found.right.mean()
        low, high = (100 * bound for bound in interval(found.right))
        left, most = interval(found.kl)
        around = {"xerr": [found.cost - left, most - found.cost], "yerr": [right - low, high - right]}
        place = {axis: [[max(0.0, width)] for width in widths] for axis, widths in around.items()}  # of rounding
        marker = {"fmt": "*", "ms": 16} if name == choice else {"fmt": "o", "ms": 7}
        axes.errorbar(found.cost, right, **place, **marker, elinewidth=0.8, color=f"C{i % 10}", label=titles[name])
    line = sorted((measured[name].cost, 100 * measured[name].right.mean()) for name in frontier(measured))
    axes.plot(*zip(*line, strict=True), color="0.6", lw=1, zorder=0, label="frontier")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.01)
    axes.set_xlabel("distance from the VLM's own answers, in nats a token (less is better)")
    axes.set_ylabel("right answers in percent")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(output, dpi=110)
