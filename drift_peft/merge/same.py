"""Is an existing folder what this merge would make? Merged again to tell, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints import Checkpoint, is_pinned, layer_order, sampled
from ..prior import HOW_KEY, MergedDelta, read_merge

# Of the weights that are merged again, and of those that stay as they are, where the hub's commits say that the models
# are the same. Two experts may differ in any one weight: else all are.
SAMPLED = 3
LAST_BITS = 8 * torch.finfo(torch.float32).eps  # of the largest entry: how far off another machine's fp32 may be


def difference(
    output: Path,
    checkpoint: Checkpoint,
    names: dict[str, str],
    blocks: Callable[[str, torch.Tensor], Iterator[torch.Tensor]],
    claim: MergedDelta | None,
    how: dict,
) -> str | None:
    """The first thing in which a folder differs from what is merged with these settings of these models, in words for
    `refuse_other`; None if there is none.

    Args:
        output: the folder.
        checkpoint: the base.
        names: key in the base of each weight that is merged -> its canonical name.
        blocks: what replaces a tensor of the base, as `write_model` takes it.
        claim: what config.json would say; a folder's id is not compared, since it may have another place today.
        how: the settings, which config.json holds where there is no claim.
    """
    try:
        merged = Checkpoint(output)
        had = read_merge(merged.config)
    except (ValueError, OSError) as error:
        return f"is no merged model ({error})"
    if (had and _settings(had)) != (claim and _settings(claim)):
        was = f"is {had.words}" if had else "was merged in another way"
        return f"{was}, not {claim.words if claim else 'this'}"
    made_by = getattr(merged.config, HOW_KEY, None)
    if claim is None and not isinstance(made_by, dict):
        return "does not say how it was merged"
    for key, wanted in how.items() if claim is None else ():
        if (was := made_by.get(key)) != wanted:
            return f"was merged with {key}={was}, not {wanted}"
    made = [checkpoint.layout.conversions[name].sources for name in names if name not in checkpoint.keys]
    kept = {*checkpoint.keys} - {*names}.union(*made)
    most = SAMPLED if had and claim and _same_commits(had, claim) else len(checkpoint.keys) + len(names)
    # By shards, since one of each model is open at a time, and by layers, as the other models' shards are cut, too.
    chosen = [*sampled(names, most), *sampled(kept, most)]
    for raw in sorted(chosen, key=lambda raw: (checkpoint.files_of(raw), raw in kept, layer_order(names.get(raw, "")))):
        W = checkpoint.tensor(raw)
        there = raw in merged.keys or raw in merged.layout.conversions
        held = there and merged.shape(raw) == tuple(W.shape)
        if not held or not (
            torch.equal(merged.tensor(raw), W) if raw in kept else _holds(merged.tensor(raw), W, blocks(raw, W))
        ):
            return f"holds another {raw} than this merge"
    return None


def _same_commits(had: MergedDelta, claim: MergedDelta) -> bool:
    origins = [(had.base, claim.base), (had.expert, claim.expert), (had.reference, claim.reference)]
    return all(one == other and (one is None or is_pinned(one)) for one, other in origins)


def _holds(there: torch.Tensor, W: torch.Tensor, blocks: Iterable[torch.Tensor]) -> bool:
    """Whether each entry is that of W', in fp32 in these blocks of rows, rounded to W's dtype. A norm of what differs
    could not tell: near experts differ by less than 16 bits round W."""
    start, largest = 0, max(map(abs, map(float, W.aminmax())))
    for block in blocks:
        rows = there[start : start + len(block)]
        slack = LAST_BITS * max(largest, block.abs().max().item())
        least, most = (block - slack).to(W.dtype), (block + slack).to(W.dtype)
        if not ((least <= rows) & (rows <= most)).all():
            return False
        start += len(block)
    return True


def _settings(claim: MergedDelta) -> tuple:
    roles = {role: getattr(claim, role) is not None for role in ("base", "expert", "reference")}
    plain = replace(claim, **roles, modules=tuple(sorted(claim.modules)), only_layers=tuple(claim.only_layers or ()))
    return tuple(vars(plain).values())
