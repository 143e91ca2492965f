"""Is an existing folder what this merge would make? Asked on a few weights, of which nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints import Checkpoint, sampled
from ..prior import HOW_KEY, MergedDelta, read_merge

SAMPLED = 3  # of the weights that are merged again, and of those that stay as they are


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
        claim: what config.json would say; ids of models are not compared, since a folder may have another place today.
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
    for raw in [*sampled(names, SAMPLED), *sampled(kept, SAMPLED)]:
        W = checkpoint.tensor(raw)
        wanted = W if raw in kept else torch.cat([block.to(W.dtype) for block in blocks(raw, W)])
        there = raw in merged.keys or raw in merged.layout.conversions
        held = there and merged.shape(raw) == tuple(W.shape)
        # Another machine may round the last bit differently.
        allowed = 0.0 if raw in kept else torch.finfo(W.dtype).eps * wanted.float().norm()
        if not held or (merged.tensor(raw).float() - wanted.float()).norm() > allowed:
            return f"holds another {raw} than this merge"
    return None


def _settings(claim: MergedDelta) -> tuple:
    roles = {role: getattr(claim, role) is not None for role in ("base", "expert", "reference")}
    plain = replace(claim, **roles, modules=tuple(sorted(claim.modules)), only_layers=tuple(claim.only_layers or ()))
    return tuple(vars(plain).values())
