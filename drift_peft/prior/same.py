"""Is an existing prior what this build would make? Δ is taken again to tell, and nothing is decomposed."""

from __future__ import annotations

import math

import torch

from ..checkpoints import Checkpoint, Match, is_pinned
from .delta import FINGERPRINT, measure_delta
from .file import PriorFile, PriorVector
from .reading import Weights

TOLERANCE = 1e-4  # of a norm, between devices and numbers of threads
OF_DIRECTIONS = 1e-2  # of the largest singular value: several times what U and Vh lose in bf16


def difference(
    prior: PriorFile, sources: dict[str, Checkpoint], match: Match, settings: dict, force: bool, delete_shards: bool
) -> str | None:
    """The first thing in which a prior differs from what is built with these settings of these models, in words for
    `refuse_other`; None if there is none.

    The hub's commits tell models apart at once. In folders Δ itself does, of every weight: they may lie elsewhere
    today, and two experts may differ in any one weight.
    """
    header = prior.metadata
    if "parents" in header:
        return "was combined from other priors"
    if "gated" in header:
        return "was gated"
    for key, wanted in settings.items():
        if (had := header.get(key)) != wanted:
            return f"was built with {key}={had}, not {wanted}"
    if header.get("force") and not force:
        return "was built with force=True, of models that have nothing in common somewhere"
    if (had := header["reference"] is not None) != ("reference" in sources):
        return f"was built {'with' if had else 'without'} a reference, unlike this one"
    held = {*prior, *header["not_steered"]}
    if held != match.keys.keys():
        return f"differs from this build in {min(held ^ match.keys.keys())}"
    if all(is_pinned(source.origin) and source.origin == header[role] for role, source in sources.items()):
        return None
    with Weights(sources, match, [*held], torch.device("cpu"), delete_shards) as weights:
        for name, tensors in weights:
            rows = match.rows_of(name, tensors)
            delta, found = measure_delta(tensors, rows)
            if not _holds(prior, name, delta, found, rows):
                models = " and ".join(source.source for source in sources.values())
                return f"was built of other models than {models}"
    return None


def _holds(prior: PriorFile, name: str, delta: torch.Tensor, found: dict, rows: dict[str, torch.Tensor] | None) -> bool:
    """Whether the prior was built of this Δ [n, in]; `found` holds its measured norms."""
    if name not in prior:
        return found["delta_norm"] == 0
    weight, norms = prior[name], ("delta_norm", "base_norm")
    if not all(math.isclose(found[norm], getattr(weight, norm), rel_tol=TOLERANCE) for norm in norms):
        return False
    if isinstance(weight, PriorVector):
        return float((delta[:, 0] - weight.delta).norm()) <= TOLERANCE * weight.delta_norm
    # u_iᵀ Δ v_i = S_i: other experts may be as far away, in other directions.
    U = weight.U if rows is None else weight.U[rows["base"]]
    products = U[:, :FINGERPRINT].float() * (delta @ weight.Vh[:FINGERPRINT].float().T)
    return bool(((products.sum(0) - weight.S[:FINGERPRINT]).abs() <= OF_DIRECTIONS * weight.S[0]).all())
