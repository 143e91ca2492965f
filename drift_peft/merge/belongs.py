"""Is this the model that an adapter was trained on? Asked before anything is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from ..checkpoints import (
    DRIFT_CONFIG,
    Checkpoint,
    LowRank,
    Update,
    Whole,
    at_revision,
    cached_snapshot,
    place_of,
    recorded_base,
    repository_of,
    sampled,
)
from ..prior import FINGERPRINT_TOLERANCE, ROUNDING_TOLERANCE, MergedDelta, ReasoningPrior, fingerprint_of, read_merge
from ..warn import warn

SAMPLED = 3  # weights that are compared with those of the recorded base
_IN_FOUR_BITS = re.compile(r"(?:-unsloth)?-bnb-4bit")  # how repositories are called that hold a model in 4 bits
# How any run's folder may be called: model, merged, best_model, checkpoint-100.
_SAYS_LITTLE = re.compile(r"(?:(?:final|last|best|merged|model|checkpoint|output|\d)[-_]?)+")


def refuse_other_base(checkpoint: Checkpoint, folder: Path, adapter: str, updates: dict[str, Update]) -> None:
    """Refuse a model that is not the one that the adapter was trained on.

    The fingerprint in the prior that steered the adapter decides, where the prior is still there. Of a base that has
    taken a part of Δ in (`prior.MergedDelta`), it says whether that is true, and the record which of the two bases was
    trained on. Else the base that the adapter records: by its weights, where they are on this machine under another
    name, or by its name. A warning says where the name leaves it open.

    Args:
        checkpoint: the base that was given.
        folder: the adapter's.
        adapter: what the user calls it.
        updates: what the adapter does to the base.

    Raises:
        ValueError: it is another model, with both names; or the adapter is in it already.
    """
    (recorded, revision), prior = recorded_base(folder), _prior(folder)
    near, why, trained_on, base = False, None, recorded, at_revision(checkpoint.source, checkpoint.revision)
    if revision and not Path(recorded or "").exists():
        trained_on = at_revision(recorded, revision)
    if prior is not None:
        merged = read_merge(checkpoint.config)
        near, why = _by_fingerprint(checkpoint, prior, merged, updates)
        trained_on = trained_on or prior.metadata["base"]["id"]
        if near and merged == _merged_into(recorded):
            return
    if why is None and recorded:
        origin = {"id": recorded, "revision": revision}
        why, known = _by_record(checkpoint, origin, updates)
        if why is None and not (known or near):
            repository = repository_of(origin)
            on_the_hub = repository is not None and not _IN_FOUR_BITS.search(repository[0].lower())
            way_out = f": name {at_revision(*repository)} as the base" if on_the_hub else ""
            warn(
                f"Adapter {adapter} was trained on {trained_on}. Whether base {base} has the same weights was not "
                f"compared, since {trained_on} is not on this machine in full precision{way_out}."
            )
    if why is not None:
        raise ValueError(
            f"adapter {adapter} was trained on {trained_on}, and base {base} {why}: name the model that "
            "it was trained on, or pass force=True (--force)"
        )


def _prior(folder: Path) -> ReasoningPrior | None:
    """What steered the adapter, if it is still where it was and what it was."""
    try:
        own = json.loads((folder / DRIFT_CONFIG).read_text(encoding="utf-8"))
        if not own.get("prior") or not Path(own["prior"]).exists():
            return None
        prior = ReasoningPrior.load(own["prior"])
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return prior if prior.sha256 == own.get("prior_sha256") else None


def _merged_into(recorded: str | None) -> MergedDelta | None:
    """What the recorded base has taken in, if it is on this machine."""
    try:
        return read_merge(Checkpoint(recorded).config) if recorded and Path(recorded).exists() else None
    except (ValueError, OSError):  # as of one in 4 bits
        return None


def _by_fingerprint(
    checkpoint: Checkpoint, prior: ReasoningPrior, merged: MergedDelta | None, updates: dict[str, Update]
) -> tuple[bool, str | None]:
    """Whether u_iᵀ·W·v_i are the base's up to rounding, and what speaks against it."""
    # The prior was built for what a merged base was made of, or for that base itself; else for the nearer of these.
    built_for = prior.metadata["base"]
    alone = merged is None or place_of(built_for) != place_of(merged.base)
    merges = merged is not None and (not alone or _merged_into(built_for["id"]) is None)
    here, without, with_merge, added = [], [], [], []
    for name, U, Vh, values in prior.probes():
        raw = checkpoint.language_model.get(name)
        if raw is None or checkpoint.shape(raw) != (len(U), Vh.shape[1]):
            return False, f"has no {name} of {len(U)} x {Vh.shape[1]}"
        U, Vh, update = U.float(), Vh.float(), updates.get(raw)
        here.append(fingerprint_of(checkpoint.tensor(raw), U, Vh))
        without.append(values)
        with_merge.append(values if merged is None else values + merged.moved(prior, name, U, Vh))
        moved = torch.zeros_like(values)
        if isinstance(update, LowRank):
            moved = update.scaling * ((U.mT @ update.B.float()) * (Vh @ update.A.float().mT)).sum(-1)
        added.append(moved)
    measured, adapter = torch.cat(here), torch.cat(added)

    def off(bases: list[torch.Tensor], moved: torch.Tensor | float = 0.0) -> float:
        base = torch.cat(bases)
        return ((measured - base - moved).norm() / base.norm()).item()

    expected = min((bases for bases, may_be in ((without, alone), (with_merge, merges)) if may_be), key=off)
    if off(expected, adapter) < off(expected) / 2:
        return False, "holds the adapter already"
    if off(expected) > FINGERPRINT_TOLERANCE:
        return False, f"is another model (the prior's fingerprint is off by {off(expected):.0%})"
    return off(expected) <= ROUNDING_TOLERANCE, None


def _by_record(checkpoint: Checkpoint, origin: dict, updates: dict[str, Update]) -> tuple[str | None, bool]:
    """What speaks against the model that the adapter's config names being this one, and whether anything was said: by
    its weights, or where they lie, or a name that tells models apart."""
    place, repository = Path(origin["id"]), repository_of(origin)
    if not place.exists():
        place = cached_snapshot(*repository) if repository and repository[1] else None
    if place is not None and place.resolve() == checkpoint.folder.resolve():
        return None, True
    try:
        other = Checkpoint(place) if place else None
    except (ValueError, OSError):  # as of one in 4 bits, or of which only a part was fetched
        other = None
    if other is None:
        name, given = _called(origin), repository_of(checkpoint.origin)
        if name != _called(checkpoint.origin):
            return "is called otherwise", True
        theirs, commit = repository or (origin["id"], None)
        if given is not None and given[0] == theirs:
            return None, commit in (None, given[1])
        return None, not _SAYS_LITTLE.fullmatch(name)
    replaced = {raw for raw, update in updates.items() if isinstance(update, Whole) and not update.added}
    ours = {name: raw for name, raw in checkpoint.in_memory.items() if raw in updates and raw not in replaced}
    for name in sampled(ours, SAMPLED):
        raw, key = ours[name], other.in_memory.get(name)
        if key is None or not _same(checkpoint.tensor(raw), other.tensor(key)):
            return f"has another {raw}", True
    return None, True


def _called(origin: dict) -> str:
    """The last part of its hub id or path."""
    repository = repository_of(origin)
    place = os.path.abspath(origin["id"]) if Path(origin["id"]).exists() else origin["id"]
    last = re.split(r"[/\\]+", (repository[0] if repository else place).rstrip("/\\").lower())[-1]
    return _IN_FOUR_BITS.sub("", last)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, once both are rounded to the coarser dtype of the two."""
    dtype = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(dtype), other.to(dtype))
