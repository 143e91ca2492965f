"""A prior in numbers: what the paper's figure 2 shows, for any pair, and how much of Δ each rank holds."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ...checkpoints import layer_of, module_kind
from ..file import PriorFile
from ..header import cosine_of, is_sum
from .verdict import verdict


def prior_summary(prior: PriorFile, rank: int | None = None) -> dict:
    """The header of a prior with its statistics by layer, projection and kind of module.

    A group of weights has `relative_norm` ‖Δ‖/‖W_base‖ (None where the base is zero, as a bias may be) and captured
    `energy` ΣS²/‖Δ‖², each of its weights taken together; the lowest, mean and highest cosine of W_expert and W_base
    (`cosine`, `mean_cosine`, `highest_cosine`); and `energy_by_rank`, the energy of its matrices truncated to a rank. A
    gated prior's also has `taken`, the share ‖gated Δ‖²/‖Δ‖² of what the prior held before.

    Args:
        rank: `energy` is that of Δ truncated to it, which is what an adapter of this rank is steered by.

    Returns:
        The header with `sha256`; its `weights` with `layer` (None outside of the layers), `modules` (their kind),
        `projection` and `relative_norm` besides; the groups `rows` by layer and kind, `projections` and `kinds` over
        all layers, and the `total`; the pooled spectrum by kind (`spectra`); the gates by kind and direction (`gates`,
        empty if there are none); what the cosines are of, in words (`cosine_of`); the `verdict`.

    Raises:
        ValueError: rank < 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    weights: dict[str, dict] = {}
    squares: dict[str, torch.Tensor] = {}  # of the singular values of each matrix
    for name in prior:
        stats = weights[name] = dict(prior.metadata["weights"][name])
        stats["layer"] = layer_of(name)
        stats["modules"] = module_kind(name) or "other"
        stats["projection"] = projection(name)
        stats["relative_norm"] = _relative_norm([stats])
        if len(stats["shape"]) == 2:  # vectors are kept whole
            squares[name] = prior[name].S.double().square()
            if rank is not None:
                stats["energy"] = squares[name][:rank].sum().item() / stats["delta_norm"] ** 2
    highest = max(map(len, squares.values()), default=0)
    ranks = _ranks(highest, rank)

    def groups(*keys: str) -> list[dict]:
        members = defaultdict(list)
        for name, stats in weights.items():
            members[tuple(stats[key] for key in keys)].append(name)
        order = sorted(members, key=lambda values: [(value is None, value) for value in values])
        return [
            {**dict(zip(keys, values, strict=True)), **_statistics(members[values], weights, squares, ranks)}
            for values in order
        ]

    header = {key: value for key, value in prior.metadata.items() if key != "weights"}
    total = _statistics(list(weights), weights, squares, ranks)
    return {
        **header,
        "rank": min(rank or highest, highest),
        "sha256": prior.sha256,
        "rows": groups("layer", "modules"),
        "projections": groups("modules", "projection"),
        "kinds": groups("modules"),
        "total": total,
        "spectra": _spectra(weights, squares),
        "gates": _gates(weights),
        "cosine_of": cosine_of(header),
        "verdict": verdict(weights, total["energy_by_rank"], combined=is_sum(header)),
        "weights": weights,
    }


def projection(name: str) -> str:
    """What a canonical name stands for in its layer: q_proj, up_proj, q_proj.bias, input_layernorm, lm_head.

    >>> projection("layers.3.self_attn.q_proj.weight")
    'q_proj'
    """
    return re.sub(r"^layers\.\d+\.|self_attn\.|mlp\.|\.weight$", "", name)


def _ranks(highest: int, rank: int | None) -> list[int]:
    """Ranks to report on: powers of two from 8 or an eighth of the highest on, the highest, the one asked for."""
    if not highest:
        return []
    least = max(1, min(8, highest // 8))
    powers = [2**i for i in range(highest.bit_length()) if 2**i >= least]
    return sorted({*powers, highest, min(rank or highest, highest)})


def _relative_norm(weights: Sequence[dict]) -> float | None:
    delta, base = (math.hypot(*(w[key] for w in weights)) for key in ("delta_norm", "base_norm"))
    return delta / base if base else None


def _statistics(names: Sequence[str], weights: dict, squares: dict, ranks: Sequence[int]) -> dict:
    group = [weights[name] for name in names]
    matrices = [name for name in names if name in squares]
    cosines = [w["cosine"] for w in group]
    relative_norms = [w["relative_norm"] for w in group if w["relative_norm"] is not None]
    delta, of_matrices = (
        math.fsum(weights[name]["delta_norm"] ** 2 for name in chosen) for chosen in (names, matrices)
    )
    return {
        "weights": len(group),
        "relative_norm": _relative_norm(group),
        "relative_norm_range": [min(relative_norms), max(relative_norms)] if relative_norms else None,
        "cosine": min(cosines),
        "mean_cosine": math.fsum(cosines) / len(cosines),
        "highest_cosine": max(cosines),
        "energy": math.fsum(w["energy"] * w["delta_norm"] ** 2 for w in group) / delta,
        **_taken(group),
        "energy_by_rank": {
            k: math.fsum(squares[name][:k].sum().item() for name in matrices) / of_matrices for k in ranks if matrices
        },
    }


def _taken(group: Sequence[dict]) -> dict[str, float]:
    if not all("gates" in w for w in group):
        return {}
    return {"taken": math.fsum(w["delta_norm"] ** 2 for w in group) / math.fsum(w["ungated_norm"] ** 2 for w in group)}


def _gates(weights: dict) -> list[dict]:
    """`mean`, `least` and `most` of the gates on the i-th direction, over each kind's matrices that have it."""
    members = defaultdict(list)
    for stats in weights.values():
        if "gates" in stats:
            members[stats["modules"]].append(stats["gates"])
    rows = []
    for kind, gates in sorted(members.items()):
        each = [[row[i] for row in gates if i < len(row)] for i in range(max(map(len, gates)))]
        mean = [math.fsum(those) / len(those) for those in each]
        rows.append({"modules": kind, "mean": mean, "least": [*map(min, each)], "most": [*map(max, each)]})
    return rows


def _spectra(weights: dict, squares: dict) -> list[dict]:
    """The singular values of each kind's matrices, pooled.

    Per kind: `sigma`, σ_i/‖Δ‖ as root mean square over the matrices (weighted by ‖Δ‖²) as far as no matrix is cut off;
    `energy`, the share of ‖Δ‖² up to each rank, over the matrices together, and `least` and `most`, that of the matrix
    that has least and most of it.
    """
    members = defaultdict(list)
    for name in squares:
        members[weights[name]["modules"]].append(name)
    spectra = []
    for kind, names in sorted(members.items()):
        padded = pad_sequence([squares[name] for name in names], batch_first=True)
        norms = torch.tensor([weights[name]["delta_norm"] for name in names], dtype=torch.float64).square()
        share = padded.sum(0) / norms.sum()
        each = padded.cumsum(1) / norms[:, None]
        cut = [len(squares[name]) for name in names if len(squares[name]) < min(weights[name]["shape"])]
        spectra.append(
            {
                "modules": kind,
                "weights": len(names),
                "sigma": share.sqrt()[: min(cut, default=None)].tolist(),
                "energy": share.cumsum(0).tolist(),
                "least": each.amin(0).tolist(),
                "most": each.amax(0).tolist(),
            }
        )
    return spectra
