"""A prior file made from dense base weights and deltas, by a float64 SVD: independent of build_prior."""

import torch

from drift_peft import ReasoningPrior
from drift_peft.prior.file import FORMAT, partial_output, write_prior

GATES_FROM = {"keep_set": "0" * 64, "base": {"id": "org/vlm", "revision": None}, "seed": 0}  # as a header says it


def dense_prior(path, weights, rank=8, base="org/vlm", expert="org/expert", **header):
    """Write a prior and load it.

    Args:
        weights: canonical name -> (W_base, Δ), matrices [out, in] or vectors [n].
        rank: ceiling of the rank, or one for each matrix by name.
        base, expert: ids in the header, or whole entries.
        header: what else to change in the header.
    """
    tensors, stats = {}, {}
    for name, (W, delta) in weights.items():
        W, delta = W.detach().double(), delta.detach().double()
        cosine = torch.cosine_similarity(W.flatten(), (W + delta).flatten(), dim=0).item()
        stats[name] = {"shape": list(W.shape), "base_norm": W.norm().item(), "cosine": cosine, "energy": 1.0}
        stats[name]["delta_norm"] = delta.norm().item()
        if delta.dim() == 1:
            tensors[f"{name}.delta"] = delta.float()
            continue
        k = rank[name] if isinstance(rank, dict) else rank
        U, S, Vh = (factor.contiguous() for factor in truncated(delta, k))
        U[~delta.any(dim=1)] = 0  # exactly, as rows without a counterpart are
        U, S, Vh = U.bfloat16(), S.float(), Vh.bfloat16()
        tensors |= {f"{name}.U": U, f"{name}.S": S, f"{name}.Vh": Vh}
        fingerprint = [(U[:, i].double() @ W @ Vh[i].double()).item() for i in range(min(8, len(S)))]
        energy = (S.double().square().sum() / delta.square().sum()).item()
        stats[name] |= {"rank": len(S), "energy": min(1.0, energy), "fingerprint": fingerprint}
    ceiling = max(rank.values()) if isinstance(rank, dict) else rank
    origins = {
        role: origin if isinstance(origin, dict) else {"id": str(origin), "revision": None}
        for role, origin in (("base", base), ("expert", expert))
    }
    metadata = {"format": FORMAT, **origins, "reference": None, "rank": ceiling, "seed": 0, "dtype": "bfloat16"}
    metadata |= {"modules": ["attn", "mlp"], "not_steered": [], "weights": stats}
    with partial_output(path, overwrite=True) as folder:
        write_prior(folder, path, tensors, metadata | header)
    return ReasoningPrior.load(path)


def truncated(matrix, rank):
    """U [out, k], S [k], Vh [k, in] of the best rank-k approximation."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def stored(weight):
    """U diag(S) Vh of a PriorWeight, or Δ of a PriorVector, in float64."""
    if hasattr(weight, "delta"):
        return weight.delta.double()
    return weight.U.double() @ torch.diag(weight.S.double()) @ weight.Vh.double()
