"""The method of METHOD.md in dense float64: the oracle of the tests.

Written from the method's text alone, one layer at a time, with every [out, in] matrix formed: as plain and as slow as
possible. It imports nothing of the library.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layer:
    """One adapted weight, W_eff = W + s·B·A + Σ others, and its prior Δ_r = U diag(S) Vh, cut to `rank` columns.

    An embedding acts as W + s·(B·A)ᵀ: in this layout its Δ is transposed.
    """

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    s: float
    U: Tensor  # [out, k]
    S: Tensor  # [k]
    Vh: Tensor  # [k, in]
    rank: int | None = None  # drift_rank; None: the adapter's own
    others: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # further active adapters: (A, B, s)
    power: float = 1.0  # drift_spectrum
    embedding: bool = False

    def __post_init__(self):
        k = self.rank or len(self.A)
        self.A, self.B, self.s = self.A.detach().double(), self.B.detach().double(), float(self.s)
        self.U, self.S, self.Vh = self.U[:, :k].double(), spectrum(self.S[:k], self.power), self.Vh[:k].double()
        if self.embedding:
            self.U, self.Vh = self.Vh.T, self.U.T
        self.others = [(A.detach().double(), B.detach().double(), float(s)) for A, B, s in self.others]

    @property
    def delta(self) -> Tensor:
        """Δ_r [out, in]."""
        return self.U @ torch.diag(self.S) @ self.Vh

    @property
    def adapters(self) -> Tensor:
        """What all active adapters add to W [out, in]."""
        total = self.s * self.B @ self.A
        for A, B, s in self.others:
            total = total + s * B @ A
        return total

    def weight_direction(self, target: str) -> Tensor:
        """X [out, in] of the targets `residual` and `delta`."""
        return {"residual": self.delta - self.adapters, "delta": self.delta}[target]

    def directions(self, target: str) -> tuple[Tensor, Tensor]:
        """D_A [r, in] and D_B [out, r]."""
        if target == "factors":
            root = torch.diag((self.S / self.s).sqrt())
            return root @ self.Vh - self.A, self.U @ root - self.B
        X = self.weight_direction(target)
        return self.s * self.B.T @ X, self.s * X @ self.A.T

    def strength(self, a: float, scale: str, target: str) -> float:
        """a, for the residual of gradnorm and adaptive times min(1, ‖X‖/‖Δ_r‖)."""
        if target != "residual" or scale == "absolute":
            return a
        return a * min(1.0, ratio(norm(self.weight_direction("residual")), norm(self.delta)))

    def biased(self, g_A: Tensor, g_B: Tensor, a: float, scale: str, target: str) -> tuple[Tensor, Tensor]:
        """What the optimizer gets instead of g_A and g_B."""
        D_A, D_B = self.directions(target)
        if target != "factors":  # a direction below rounding is none
            size = 1e-6 * self.s * norm(self.weight_direction(target))
            D_A = D_A if norm(D_A) > size * norm(self.B) else torch.zeros_like(D_A)
            D_B = D_B if norm(D_B) > size * norm(self.A) else torch.zeros_like(D_B)
        a = self.strength(a, scale, target)
        return biased(g_A.double(), D_A, a, scale), biased(g_B.double(), D_B, a, scale)

    def pulled(self, lr: float, a: float, target: str = "factors") -> tuple[Tensor, Tensor]:
        """A and B after the `decoupled` part of a step: p + lr·a·(p* − p), targets split as the `drift` start does."""
        if target == "base":
            return self.A, (1 - lr * a) * self.B
        c = 1 / 3**0.5
        A_star, B_star = c * self.Vh, self.U @ torch.diag(self.S) / (self.s * c)
        return self.A + lr * a * (A_star - self.A), self.B + lr * a * (B_star - self.B)


@dataclass
class Whole:
    """A tensor W that is trained itself, from W_0 on, and its Δ. The target of `factors` is W_0 + Δ."""

    W: Tensor
    W0: Tensor
    delta: Tensor

    def __post_init__(self):
        self.W, self.W0, self.delta = (t.detach().double() for t in (self.W, self.W0, self.delta))

    def directions(self, target: str) -> tuple[Tensor]:
        return (self.delta if target == "delta" else self.delta - (self.W - self.W0),)

    def biased(self, g: Tensor, a: float, scale: str, target: str) -> tuple[Tensor]:
        """What the optimizer gets instead of g."""
        (D,) = self.directions(target)
        if target == "residual" and scale != "absolute":
            a = a * min(1.0, ratio(norm(D), norm(self.delta)))
        return (biased(g.double(), D, a, scale),)

    def pulled(self, lr: float, a: float, target: str = "factors") -> tuple[Tensor]:
        goal = self.W0 if target == "base" else self.W0 + self.delta
        return (self.W + lr * a * (goal - self.W),)


def spectrum(S: Tensor, power: float) -> Tensor:
    """S^p, as long as S."""
    S = S.double()
    return S**power * norm(S) / norm(S**power)


def schedule(step: int, warmup: int, decay: int | None) -> float:
    """What the strength of the step after `step` others is multiplied with."""
    if step < warmup:
        return step / warmup
    if decay is None:
        return 1.0
    return max(0.0, (warmup + decay - step) / decay)


def biased(g: Tensor, D: Tensor, a: float, scale: str) -> Tensor:
    """Equations 3 and 4 with our sign, for one tensor: minus a times the scaled direction."""
    if scale == "absolute":
        return g - a * D
    if scale == "adaptive":
        a = a * (1 + ratio(float((g * D).sum()), norm(g) * norm(D))) / 2
    return g - a * ratio(norm(g), norm(D)) * D


def norm(matrix: Tensor) -> float:
    return float(matrix.square().sum().sqrt())


def ratio(numerator: float, denominator: float) -> float:
    """0/0 is 0."""
    return numerator / denominator if denominator > 0 else 0.0
