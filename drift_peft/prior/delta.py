"""Δ of one weight: subtracted a block at a time, measured, decomposed."""

import math
from collections.abc import Iterator

import torch

from .svd import ROUNDING, truncated_svd

FINGERPRINT = 8  # how many singular directions recognize the base
BLOCK = {"cpu": 1 << 18}  # elements that are subtracted at once: they fit the cache, and only Δ is ever whole in fp32
LARGE_BLOCK = 1 << 24  # on other devices, where each operation costs a launch
LEAST_COSINE = 0.1  # matrices of one ancestor have a cosine near 1; unrelated or shifted ones near 0


def take_delta(
    tensors: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor] | None,
    rank: int,
    energy: float | None,
    seed: int,
    labels: dict[str, str],
) -> tuple[dict[str, torch.Tensor], dict]:
    """Δ = expert − base, or expert − reference if there is one, as a prior's file holds it, and what its header says.

    Args:
        tensors: role ("expert", "base", perhaps "reference") -> W [out, in], or a vector [out], in any float dtype, on
            the device that computes. All but the base are taken out of the dictionary once Δ is there.
        rows: role -> [n] rows that belong together: Δ is zero in the others, and they take no part in any number. None:
            all rows, each with that of the same number.
        rank: ceiling of the rank.
        energy: captured energy to reach with the smallest rank that does; None: the rank is the ceiling.
        seed: of the randomized SVD.
        labels: role -> what an error calls the tensor.

    Returns:
        U, S, Vh (bf16, fp32, bf16) of a matrix or the whole `delta` (fp32) of a vector, on the CPU, and the statistics.
        No tensors where Δ is zero. Among the statistics `cosines`, of the expert and each other role, which the header
        does not hold.

    Raises:
        ValueError: a tensor holds NaN or infinite values, or entries too small to have a norm.
    """
    base = tensors["base"]
    shape = base.shape
    delta, stats = _subtract(tensors, rows, labels)
    stats = {"shape": list(shape), **stats} | ({} if rows is None else {"rows": len(delta)})
    if stats["delta_norm"] == 0:
        return {}, stats
    if len(shape) == 1:
        return {"delta": _spread(delta[:, 0].cpu(), rows, shape[0])}, {**stats, "energy": 1.0}

    U, S, Vh, captured = truncated_svd(delta, rank, seed=seed)
    if energy is not None:
        shares = S.cpu().double().square().cumsum(0) / stats["delta_norm"] ** 2
        k = min(int((shares < energy).sum()) + 1, len(S))
        U, S, Vh, captured = U[:, :k], S[:k], Vh[:k], min(1.0, float(shares[k - 1]))
    # Of a Δ of low rank, as an adapter's, what is left is how fp32 has rounded W and the SVD.
    rounding = max(ROUNDING * float(S[0]), torch.finfo(torch.float32).eps * stats["base_norm"])
    k = max(1, int((S > rounding).sum()))
    if k < len(S):
        U, S, Vh = U[:, :k], S[:k], Vh[:k]
        captured = min(1.0, float(S.double().square().sum()) / stats["delta_norm"] ** 2)
    U, Vh = U.bfloat16(), Vh.bfloat16()
    # u_iᵀ W v_i of the factors as stored: whoever checks it has no others.
    u, v = U[:, :FINGERPRINT], Vh[:FINGERPRINT]
    fingerprint = sum(fingerprint_of(parts["base"], u[block], v) for block, parts in _blocks({"base": base}, rows))
    stats |= {"rank": len(S), "energy": captured, "fingerprint": fingerprint.tolist()}
    return {"U": _spread(U.cpu(), rows, shape[0]), "S": S.cpu().contiguous(), "Vh": Vh.cpu().contiguous()}, stats


def fingerprint_of(W: torch.Tensor, U: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
    """u_iᵀ·W·v_i [k] in fp32 of W [out, in], for the columns of U [out, k] and the rows of Vh [k, in]."""
    return (U.float() * (W.float() @ Vh.float().mT)).sum(0)


def measure_delta(tensors: dict[str, torch.Tensor], rows: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, dict]:
    """Δ [n, in] of one weight in fp32, and `delta_norm`, `base_norm` and `cosine` as `take_delta` measures them;
    arguments as there."""
    return _subtract(dict(tensors), rows, dict.fromkeys(tensors, "a weight"))


def refuse_unrelated(name: str, cosine: float, expert: str, other: str) -> None:
    """ValueError if a matrix of the expert has nothing in common with that of the other model, by their cosine."""
    if abs(cosine) < LEAST_COSINE:
        raise ValueError(
            f"{name} of {expert} has cosine {cosine:.3f} with that of {other}: no common ancestor, or shifted layers; "
            "force=True (--force) goes on nevertheless"
        )


def _subtract(
    tensors: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor] | None,
    labels: dict[str, str],
) -> tuple[torch.Tensor, dict]:
    """Δ [n, in] in fp32, and its norm, the base's and the cosines with the expert.

    A weight that was never trained differs all the same where one model is stored in another dtype. Where no entry of Δ
    is beyond what the two have rounded, Δ is zero. Unless the finer holds numbers of the coarser dtype alone: rounding
    would have changed none of them, so Δ was trained, if the finer was not cast from the coarser either.
    """
    base = tensors["base"]
    n, width = len(base) if rows is None else len(rows["base"]), math.prod(base.shape[1:])
    delta = torch.empty(n, width, device=base.device, dtype=torch.float32)
    # Of each row in fp32, together in fp64: one fp32 sum over 10⁷ entries is off by 1e-4.
    norms = {role: torch.empty(n, device=base.device, dtype=torch.float32) for role in (*tensors, "delta")}
    inner = {role: torch.empty(n, device=base.device, dtype=torch.float32) for role in tensors if role != "expert"}
    origin = "reference" if "reference" in tensors else "base"
    dtypes = tensors["expert"].dtype, tensors[origin].dtype
    near, exact, cast = dtypes[0] != dtypes[1], True, True
    for block, parts in _blocks(tensors, rows):
        torch.sub(parts["expert"], parts[origin], out=delta[block])
        near = near and _rounded_alike(delta[block], parts["expert"], parts[origin], dtypes)
        if near:
            exact_here, cast_here = _exact_and_cast(parts["expert"], parts[origin], dtypes)
            exact, cast = exact and exact_here, cast and cast_here
        for role, part in (*parts.items(), ("delta", delta[block])):
            norms[role][block] = torch.linalg.vector_norm(part, dim=1)
        for role, products in inner.items():
            products[block] = parts[role].mul_(parts["expert"]).sum(1)
    if near and (cast or not exact):
        delta.zero_()
        norms["delta"].zero_()
    for role in [role for role in tensors if role != "base"]:
        del tensors[role]
    norm = {role: float(torch.linalg.vector_norm(each.cpu().double())) for role, each in norms.items()}
    for role, label in labels.items():
        if not math.isfinite(norm[role]):  # which costs nothing beyond the norm
            raise ValueError(f"{label} holds NaN or infinite values")
    if norm["delta"] == 0 and delta.any():
        raise ValueError(f"{labels['expert']} differs by so little that the norm of Δ vanishes in fp32")
    cosines = {role: _cosine(products, norm["expert"] * norm[role]) for role, products in inner.items()}
    stats = {"delta_norm": norm["delta"], "base_norm": norm["base"], "cosine": cosines["base"]}
    return delta, {**stats, "cosines": cosines}


def _rounded_alike(
    delta: torch.Tensor, one: torch.Tensor, other: torch.Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> bool:
    """Whether one and other, in these dtypes, may have been the same numbers everywhere: each is within half a step.

    A step is at most eps·|w|, or eps times the smallest normal number. Rounding the finer to the coarser dtype instead
    would not do. Where one model is in fp16, and the other in bf16 from the start, 6 % of the entries differ even then.
    And it would cost trained weights: where they moved by 0.3 %, in bf16 and fp16, cos with the true Δ is 0.87 as it
    is, and 0.80 when rounded.
    """
    infos = [torch.finfo(dtype) for dtype in dtypes]
    relative, least = (sum(of) / 2 for of in zip(*((i.eps, i.eps * i.smallest_normal) for i in infos), strict=True))
    return bool((delta.abs() <= torch.maximum(one.abs(), other.abs()) * relative + least).all())


def _exact_and_cast(
    one: torch.Tensor, other: torch.Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[bool, bool]:
    """Whether the coarser dtype holds each number of the one in the finer dtype, and whether these are the others' own,
    cast."""
    (fine, fine_dtype), (coarse, coarse_dtype) = sorted(
        zip((one, other), dtypes, strict=True), key=lambda pair: torch.finfo(pair[1]).eps
    )
    return torch.equal(fine.to(coarse_dtype).float(), fine), torch.equal(coarse.to(fine_dtype).float(), fine)


def _cosine(products: torch.Tensor, norms: float) -> float:
    """From ⟨·, ·⟩ row by row and the product of both norms; 0/0 is 0."""
    return float(products.cpu().double().sum()) / norms if norms else 0.0


def _blocks(
    tensors: dict[str, torch.Tensor], rows: dict[str, torch.Tensor] | None
) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    """Consecutive rows of all tensors in fp32, a vector as a column; each block overwrites the one before."""
    first = next(iter(tensors))
    n, width = len(tensors[first] if rows is None else rows[first]), math.prod(tensors[first].shape[1:])
    device = tensors[first].device
    step = max(1, BLOCK.get(device.type, LARGE_BLOCK) // width)
    # Memory that is asked for anew in each block costs more than the arithmetic.
    parts = {role: torch.empty(min(n, step), width, device=device, dtype=torch.float32) for role in tensors}
    for start in range(0, n, step):
        block = slice(start, min(n, start + step))
        for role, tensor in tensors.items():
            taken = tensor[block if rows is None else rows[role][block]]
            parts[role] = parts[role][: len(taken)].copy_(taken.reshape(len(taken), -1))
        yield block, parts


def _spread(values: torch.Tensor, rows: dict[str, torch.Tensor] | None, n: int) -> torch.Tensor:
    """The values at the base's rows, zero in the others."""
    if rows is None:
        return values.contiguous()
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows["base"], values)
