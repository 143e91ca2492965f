"""The method as pure functions on tensors: it knows no modules and no optimizers.

Notation: an adapter acts on a weight W [out, in] as W + s·B·A, with A [r, in], B [out, r] and the LoRA scaling s; the
prior is Δ_r = U diag(S) Vh with U [out, k], S [k], Vh [k, in]. Every function takes any number of leading batch
dimensions `…`, so that all layers of one shape go through in one call, and scalars such as s are tensors of shape […].
Nothing of size [out, in] is ever formed. Source: DRIFT, arXiv 2510.15050, equations 3 and 4, pulled back onto LoRA by
the chain rule g_A = s·Bᵀ·G, g_B = s·G·Aᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-5  # of the largest singular value
START_NORM = 3**-0.5  # the row norm of PEFT's Kaiming start


class Direction(NamedTuple):
    """Where the bias points, for both factors."""

    A: Tensor  # […, r, in]
    B: Tensor  # […, out, r]
    floor_A: Tensor  # […]  ‖D_A‖ up to here is rounding, and counts as no direction
    floor_B: Tensor  # […]
    share: Tensor | float  # […]  what the strength of gradnorm and adaptive is multiplied with: min(1, ‖X‖/‖Δ_r‖)
    norm: Tensor | None = None  # […]  ‖X‖, where there is an X in weight space


def column(scalar: Tensor) -> Tensor:
    return scalar[..., None, None]


def norm(matrix: Tensor) -> Tensor:
    """Frobenius norm over the last two dimensions, shape […]."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def gradient_norm(g: Tensor) -> Tensor:
    """The same of a gradient, whose size is anybody's: in fp32 the square of 1e20 overflows and that of 1e-25 vanishes,
    so the largest entry is taken out first."""
    largest = g.abs().amax((-2, -1))
    return largest * norm(g / column(torch.where(largest > 0, largest, 1.0)))


def schedule(step: int | Tensor, warmup: int, decay: int | None) -> float | Tensor:
    """What the strength is multiplied with before step number `step` (from 0): linear from 0 to 1 over `warmup` steps,
    then, unless `decay` is None, linear to 0 over `decay` steps."""
    step = step.float() if isinstance(step, Tensor) else step
    up = step / warmup if warmup else 1.0
    down = 1.0 if decay is None else 1 - (step - warmup) / decay
    if isinstance(step, Tensor):
        return torch.minimum(torch.as_tensor(up), torch.as_tensor(down)).clamp_min(0)
    return max(0.0, min(up, down))


def gram_norm(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """‖U diag(S) Vh‖_F […], from the Gram matrices: factors stored in bf16 are only nearly orthonormal."""
    return ((U.mT @ U) * (Vh @ Vh.mT) * S[..., :, None] * S[..., None, :]).sum((-2, -1)).clamp_min(0).sqrt()


def delta(A: Tensor, B: Tensor, s: Tensor, U: Tensor, S: Tensor, Vh: Tensor, delta_norm: Tensor) -> Direction:
    """The paper's constant direction X = Δ_r: D_A = s·Bᵀ·X, D_B = s·X·Aᵀ. `delta_norm` […] is ‖Δ_r‖."""
    D_A = column(s) * ((B.mT @ U) * S[..., None, :]) @ Vh
    D_B = column(s) * U @ (S[..., :, None] * (Vh @ A.mT))
    return _with_floors(D_A, D_B, A, B, s, delta_norm, share=1.0)


def residual(
    A: Tensor,
    B: Tensor,
    s: Tensor,
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    delta_norm: Tensor,
    A_all: Tensor | None = None,
    B_all: Tensor | None = None,
) -> Direction:
    """What is still missing, X = Δ_r − Σ s·B·A over all active adapters.

    A_all […, R, in] and B_all […, out, R] are the stacked factors of every active adapter, this one's first, with the
    scaling within B_all; left out, they are those of this adapter alone.
    """
    r = A.shape[-2]
    A_all = A if A_all is None else A_all
    B_all = column(s) * B if B_all is None else B_all
    # Sums over in and out, of which little comes out, take most of the time: each is computed once.
    UtB, AVt = U.mT @ B_all, A_all @ Vh.mT  # […, k, R], […, R, k]
    BtB, AAt = B_all.mT @ B_all, A_all @ A_all.mT  # […, R, R]
    # ‖X‖² = ‖Δ_r‖² − 2·Σ_i S_i·[(UᵀB)(A Vhᵀ)]_ii + tr((BᵀB)(A Aᵀ)), with s inside B
    cross = (S * (UtB * AVt.mT).sum(-1)).sum(-1)
    X_norm = (delta_norm**2 - 2 * cross + (BtB * AAt).sum((-2, -1))).clamp_min(0).sqrt()
    D_A = (UtB[..., :r].mT * S[..., None, :]) @ Vh - BtB[..., :r, :] @ A_all  # s·Bᵀ·X
    D_B = column(s) * (U @ (S[..., :, None] * AVt[..., :r, :].mT) - B_all @ AAt[..., :r])  # s·X·Aᵀ
    share = torch.where(delta_norm > 0, X_norm / delta_norm, 0.0).clamp_max(1)
    return _with_floors(D_A, D_B, A, B, s, X_norm, share)


def _with_floors(D_A: Tensor, D_B: Tensor, A: Tensor, B: Tensor, s: Tensor, X_norm: Tensor, share) -> Direction:
    rounding = 1e-6 * s.abs() * X_norm
    return Direction(D_A, D_B, rounding * norm(B), rounding * norm(A), share, X_norm)


def balanced_targets(U: Tensor, S: Tensor, Vh: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The SVD's own factors, A* = √(S/s)·Vh and B* = U·√(S/s), for which s·B*·A* = Δ_r."""
    root = (S / s[..., None]).sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def spectrum(S: Tensor, power: float) -> Tensor:
    """S^p […, k] in place of S, scaled so that ‖Δ_r‖ stays: p = 1 is Δ_r itself, p = 0 weighs all directions alike, but
    those that are rounding, as those beyond the rank of an expert that is a LoRA."""
    largest = S.amax(-1, keepdim=True)
    size = largest.log2().floor().exp2()  # taken out first, without rounding: the fourth power of 1e-12 vanishes
    weighted = torch.where(S > ROUNDING * largest, (S / size) ** power, 0.0)
    length = torch.linalg.vector_norm(weighted, dim=-1, keepdim=True)
    return torch.where(length > 0, weighted * (torch.linalg.vector_norm(S, dim=-1, keepdim=True) / length), 0.0)


def start_targets(U: Tensor, S: Tensor, Vh: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Δ_r split as the `drift` start splits it: A* = c·Vh and B* = U diag(S)/(s·c), with c the start's row norm."""
    return START_NORM * Vh, U * (S / (s[..., None] * START_NORM))[..., None, :]


def factors(A: Tensor, B: Tensor, A_star: Tensor, B_star: Tensor) -> Direction:
    """Straight to given factors: D_A = A* − A, D_B = B* − B."""
    return Direction(A_star - A, B_star - B, 1e-6 * norm(A_star), 1e-6 * norm(B_star), 1.0)


def multiplier(
    g_norm: Tensor,
    D_norm: Tensor,
    inner: Tensor,
    floor: Tensor | float,
    share: Tensor | float,
    alpha: float | Tensor,
    scale: str,
) -> Tensor:
    """c […] of g̃ = g − c·D, from ‖g‖, ‖D‖ and ⟨g, D⟩, each […] (eq. 3 and 4).

        absolute    c = a
        gradnorm    c = a·‖g‖/‖D‖
        adaptive    c = a·(1 + cos(g, D))/2·‖g‖/‖D‖

    0/0 is 0: where g vanishes or ‖D‖ ≤ floor, g stays as it is. So it does where it is not finite, or its norm is not.

    Raises:
        ValueError: an unknown scale.
    """
    if scale == "absolute":
        return alpha * torch.ones_like(D_norm)
    if scale == "gradnorm":
        strength = alpha * share
    elif scale == "adaptive":
        strength = alpha * share * (1 + cosine(g_norm, D_norm, inner)) / 2
    else:
        raise ValueError(f"Unknown scale {scale!r}.")
    c = strength * g_norm / D_norm
    return torch.where((D_norm > floor) & c.isfinite(), c, 0.0)


def cosine(g_norm: Tensor, D_norm: Tensor, inner: Tensor) -> Tensor:
    """⟨g, D⟩/(‖g‖·‖D‖) […] in [−1, 1]; 0/0 is 0."""
    return torch.where((g_norm > 0) & (D_norm > 0), inner / g_norm / D_norm, 0.0).clamp(-1, 1)
