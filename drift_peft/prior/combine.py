"""Truncated and gated priors and weighted sums of priors, without ever forming a matrix of a weight's size.

Side by side, the factors of low-rank matrices are those of their sum,

    Σ c_j U_j diag(S_j) Vh_j = [U_1 … U_m] diag(c_1 S_1, …, c_m S_m) [Vh_1; …; Vh_m],

so after a QR decomposition of both stacks, [U_1 … U_m] = Q_U R_U and [Vh_1; …; Vh_m]ᵀ = Q_V R_V, only the small matrix
R_U diag(…) R_Vᵀ is left for the SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..arguments import is_number
from ..checkpoints import at_revision, named, place_of
from ..warn import warn
from .file import PriorFile
from .svd import ROUNDING, signed

SAME_NORM = 1e-5  # by how much ‖W_base‖ of one and the same base may differ: by the order of summation
NOTHING = "the sum is zero in every weight, so that it would steer nothing: choose other coefficients"
TOO_LARGE = "the sum is larger than fp32 can hold: choose smaller coefficients"

Weight = tuple[str, dict[str, torch.Tensor], dict]  # canonical name, tensors, statistics as in a prior's header


def truncated_weights(prior: PriorFile, rank: int) -> Iterator[Weight]:
    """The weights of a prior with their first min(rank, k) singular directions; vectors stay as they are."""
    for name in prior:
        tensors, stats = prior.tensors(name), prior.metadata["weights"][name]
        if rank < stats.get("rank", 0):
            U, S, Vh = tensors["U"][:, :rank].contiguous(), tensors["S"][:rank], tensors["Vh"][:rank]
            tensors |= {"U": U, "S": S, "Vh": Vh}
            stats = {**stats, "rank": rank, "energy": _energy(S, stats["delta_norm"])}
            stats["fingerprint"] = stats["fingerprint"][:rank]
        yield name, tensors, stats


def gated_weights(
    prior: PriorFile, gates: Mapping[str, torch.Tensor], products: Mapping[str, torch.Tensor]
) -> Iterator[Weight]:
    """U diag(g·S) Vh of every weight, each singular direction times its gate, the largest first again.

    Nothing of it is left out, so its captured energy is 1; a weight whose gates are all 0 is left out itself. As in a
    combined prior, what recognizes the base are the parent's directions, with its fingerprint.

    Args:
        gates: canonical name -> g [k], in the order of the prior's directions.
        products: canonical name -> u_iᵀ·W_base·v_i [k], for the cosine of W and W + Δ.
    """
    probes = {name: (U, Vh, values) for name, U, Vh, values in prior.probes()}
    for name in prior:
        tensors, stats = prior.tensors(name), prior.metadata["weights"][name]
        S = gates[name].to(tensors["S"]) * tensors["S"]
        order = S.argsort(descending=True, stable=True)
        norm, inner = S.double().norm().item(), (S * products[name].to(S)).double().sum().item()
        if not norm:  # every gate has closed
            continue
        base = stats["base_norm"]
        moved = math.sqrt(max(0.0, base**2 + 2 * inner + norm**2))  # ‖W + Δ‖
        stats = {
            **{key: stats[key] for key in ("shape", "rank", "base_norm")},
            "delta_norm": norm,
            "cosine": min(1.0, (base**2 + inner) / (base * moved)) if base and moved else 0.0,
            "energy": 1.0,
            "fingerprint": [],
            "ungated_norm": tensors["S"].double().norm().item(),
            "gates": [round(gate, 4) for gate in gates[name].tolist()],
        }
        tensors = {"U": tensors["U"][:, order].contiguous(), "S": S[order], "Vh": tensors["Vh"][order].contiguous()}
        if name in probes:
            U, Vh, values = probes[name]
            stats["probe"] = values.tolist()
            tensors |= {"probe_U": U.contiguous(), "probe_Vh": Vh.contiguous()}
        yield name, tensors, stats


def checked_parents(parents: Sequence[tuple[PriorFile, float]]) -> list[tuple[PriorFile, float]]:
    """Each of these priors once, with the sum of its coefficients, and none where that is 0: what was measured of it
    says nothing of the whole.

    Raises:
        ValueError: they are not of one base, or the coefficients give no sum.
    """
    if not parents:
        raise ValueError("there is nothing to combine: name at least one prior with its coefficient")
    for prior, c in parents:
        if not is_number(c):
            raise ValueError(f"the coefficient of {prior.source} must be a finite number, got {c!r}")
    if not any(c for _, c in parents):
        raise ValueError("all coefficients are 0, so the sum would be too: give one of them another value")
    once: dict[str, tuple[PriorFile, float]] = {}
    for prior, c in parents:
        first, so_far = once.get(prior.sha256, (prior, 0))
        once[prior.sha256] = first, so_far + c
    parents = [(prior, c) for prior, c in once.values() if c]
    if not parents:
        raise ValueError(NOTHING)
    for index, (prior, _) in enumerate(parents):
        for other, _ in parents[:index]:
            _check_same_base(other, prior)
    return parents


def _check_same_base(one: PriorFile, other: PriorFile) -> None:
    """The norms of all base weights in both tell two bases apart, whatever folder they lay in; names only where there
    is no matrix to compare. Those of head and embedding are of the rows that the models had in common."""
    differ = f"{one.source} and {other.source} are priors of different bases"
    matrices = 0
    for name in (name for name in one if name in other):
        mine, theirs = (prior.metadata["weights"][name] for prior in (one, other))
        if mine["shape"] != theirs["shape"]:
            raise ValueError(f"{differ}: {name} is {mine['shape']} in one and {theirs['shape']} in the other")
        if mine.get("rows") != theirs.get("rows"):
            continue
        if not math.isclose(mine["base_norm"], theirs["base_norm"], rel_tol=SAME_NORM):
            norms = f"{mine['base_norm']:.6g} in one and {theirs['base_norm']:.6g} in the other"
            raise ValueError(f"{differ}: ‖W‖ of {name} is {norms}")
        matrices += len(mine["shape"]) == 2
    bases = [prior.metadata["base"] for prior in (one, other)]
    if place_of(bases[0]) == place_of(bases[1]):
        return
    if not matrices:
        ids = " and ".join(at_revision(base["id"], base["revision"]) for base in bases)
        raise ValueError(
            f"{differ}, {ids}, and have no matrix in common that would show them to be the same: build both from one "
            "place"
        )
    called = [named(base) for base in bases]
    if called[0] != called[1]:  # norms are alike in near fine-tunes too
        warn(
            f"{one.source} was built for {called[0]} and {other.source} for {called[1]}: their sum steers neither "
            "unless these are the same weights"
        )


def combined_header(parents: Sequence[tuple[PriorFile, float]], rank: int) -> dict:
    """Header of the sum without its weights; `not_steered` names every weight that any parent speaks of."""
    names = {name for prior, _ in parents for name in (*prior, *prior.metadata["not_steered"])}
    inherited = ("expert", "reference", "parents", "gated")
    first = parents[0][0].metadata
    return {
        **{key: first[key] for key in ("format", "base", "dtype")},
        "expert": None,
        "reference": None,
        "parents": [
            {"weight": c, "sha256": prior.sha256, **{k: prior.metadata[k] for k in inherited if k in prior.metadata}}
            for prior, c in parents
        ],
        "rank": rank,
        "seed": None,
        "modules": list(dict.fromkeys(module for prior, _ in parents for module in prior.metadata["modules"])),
        "estimates": {
            "delta_norm": "stored parts exactly, uncaptured residues taken as orthogonal to each other",
            "cosine": "the smallest of the parents'",
        },
        "not_steered": sorted(names),
    }


def combined_weights(parents: Sequence[tuple[PriorFile, float]], rank: int) -> Iterator[Weight]:
    """Σ c_j Δ_j of every weight for which it is not zero; a weight that a parent lacks is zero there.

    ‖Σ c_j Δ_j‖ is an estimate, since the parents hold only their captured parts: of these the sum is taken exactly, and
    what they did not capture is taken as orthogonal to each other, ‖·‖² = ‖Σ c_j U_j diag(S_j) Vh_j‖² + Σ c_j²·(1 −
    energy_j)·‖Δ_j‖². Residues that point the same way, as of experts with a common teacher, make it too small. The
    base's fingerprint along the new directions cannot be known without the base: instead the weights that are compared
    carry the first directions of a parent as their probes, with its fingerprint.
    """
    probes = {}
    for prior, _ in parents:
        for name, U, Vh, values in prior.probes():
            probes.setdefault(name, {"U": U, "Vh": Vh, "values": values})
    for name in dict.fromkeys(name for prior, _ in parents for name in prior):
        parts = [(c, prior[name], prior.metadata["weights"][name]) for prior, c in parents if name in prior]
        # Of an embedding, each parent has measured the rows that its models have in common.
        stats = {"shape": parts[0][2]["shape"], "base_norm": max(measured["base_norm"] for _, _, measured in parts)}
        stats["cosine"] = min(measured["cosine"] for _, _, measured in parts)
        if len(stats["shape"]) == 1:
            delta = sum(c * vector.delta for c, vector, _ in parts)
            norm = delta.double().norm().item()  # in fp32, squares of numbers below 1e-22 vanish
            if not math.isfinite(norm):
                raise ValueError(TOO_LARGE)
            if norm:
                yield name, {"delta": delta}, {**stats, "delta_norm": norm, "energy": 1.0}
            continue
        U, S, Vh, square = _weighted_sum([(c, w.U, w.S, w.Vh) for c, w, _ in parts], rank)
        if not len(S):
            continue
        residues = (c**2 * (1 - weight.energy) * weight.delta_norm**2 for c, weight, _ in parts)
        norm = math.sqrt(math.fsum([square, *residues]))
        tensors = {"U": U.bfloat16(), "S": S, "Vh": Vh.bfloat16()}
        stats |= {"rank": len(S), "delta_norm": norm, "energy": _energy(S, norm), "fingerprint": []}
        if any("rows" in measured for _, _, measured in parts):
            stats["rows"] = int(U.any(dim=1).sum())
        if name in probes:
            stats["probe"] = probes[name]["values"].tolist()
            tensors |= {f"probe_{factor}": probes[name][factor].contiguous() for factor in ("U", "Vh")}
        yield name, tensors, stats


def formula(header: dict) -> str:
    """What a prior's Δ is, from its header: `expert − base`, `expert − reference`, one of these gated, or a weighted
    sum of such."""
    if "gated" in header:
        return f"gated({formula({key: value for key, value in header.items() if key != 'gated'})})"
    if "parents" in header:
        terms = (f"{p['weight']:+g}·({formula({**p, 'base': header['base']})})" for p in header["parents"])
        return " ".join(terms).removeprefix("+")
    origins = header["expert"], header["reference"] or header["base"]
    return " − ".join(named(o) + (f"@{o['revision'][:8]}" if o["revision"] else "") for o in origins)


def _weighted_sum(
    parts: Sequence[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """SVD of Σ c U diag(S) Vh over (c, U [out, k], S [k], Vh [k, in]), cut to the rank and to what is above rounding.

    In fp32. Returns U [out, r], S [r], Vh [r, in], and ‖Σ c U diag(S) Vh‖² before the cut. The largest entry of each
    column of U is positive. Rows that are zero in every U stay exactly zero.
    """
    left = torch.cat([U for _, U, _, _ in parts], 1).float()  # [out, K]
    right = torch.cat([Vh for _, _, _, Vh in parts]).float()  # [K, in]
    middle = torch.cat([c * S for c, _, S, _ in parts])  # [K]
    Q_U, R_U = torch.linalg.qr(left)  # [out, min(out, K)], [min(out, K), K]
    Q_V, R_V = torch.linalg.qr(right.T)
    product = (R_U * middle) @ R_V.T  # of at most [K, K]
    if not math.isfinite(product.norm()):
        raise ValueError(TOO_LARGE)
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    largest = math.fsum(abs(c) * S_part[0].item() for c, _, S_part, _ in parts)
    r = min(rank, int((S > ROUNDING * largest).sum()))
    square = S.double().square().sum().item()
    U, Vh = Q_U @ U[:, :r], Vh[:r] @ Q_V.T
    U[~left.any(dim=1)] = 0
    U, Vh = signed(U, Vh)
    return U, S[:r].clone(), Vh, square


def _energy(S: torch.Tensor, norm: float) -> float:
    """Captured energy ΣS² / ‖Δ‖_F²."""
    return min(1.0, S.double().square().sum().item() / norm**2)
