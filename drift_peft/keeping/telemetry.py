"""What is told of a model that is kept: numbers, words for its card, and a warning where it was not kept after all."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints import shown
from ..warn import warn
from .kept import Keeping, keepings_of

FEW = 4  # passes; fewer that are lost may be one bad batch


def keep_telemetry(model: nn.Module) -> dict[str, float]:
    """How far the model was from the VLM on the last batch of the keep set; empty before it, or without keeping.

    Returns:
        keep_kl     L_keep in nats, the mean over the answer tokens
        keep_ratio  ‖what was added‖/‖gradient‖
    """
    for keeping in keepings_of(model):
        if keeping.kl is not None:
            on_device = [keeping.kl, keeping.ratio, *keeping.passes.to(keeping.kl.device)]
            kl, ratio, added, lost = torch.stack(on_device).tolist()
            if lost <= added:
                keeping.told = False
            elif added + lost >= FEW and not keeping.told:
                _warn_of_not_finite(keeping, int(added), int(lost))
            return {"keep_kl": kl, "keep_ratio": ratio}
    return {}


def warn_of_lost_passes(model: nn.Module) -> None:
    """Say of a model that is saved when most of what was to keep it near the VLM was not finite."""
    for keeping in keepings_of(model):
        added, lost = keeping.counts()
        if lost > added:
            _warn_of_not_finite(keeping, added, lost)


def _warn_of_not_finite(keeping: Keeping, added: int, lost: int) -> None:
    keeping.told = True
    warn(
        f"Of {added + lost} passes of keep(), {lost} were not finite and added nothing: on the keep set the model's "
        "outputs, or their gradients, are infinite or NaN, as where a vision tower overflows in float16, so train it "
        "in bfloat16 or float32."
    )


def keep_words(model: nn.Module) -> str | None:
    """What has kept the model and how, for its card; None if nothing has."""
    for keeping in keepings_of(model):
        added, lost = keeping.counts()
        if not keeping.stepped:
            continue
        keep_set, often = keeping.feed.keep_set, "every step" if keeping.every == 1 else f"every {keeping.every} steps"
        bound = "no bound" if keeping.bound is None else f"bound {keeping.bound:g}"
        bound += f"; {lost} of {added + lost} passes of this run were not finite and added nothing" if lost else ""
        bound += ": it was not kept in this run" if lost and not added else ""
        return (
            f"{len(keep_set)} answers of {shown(keep_set.metadata['vlm']['id'])} itself ({shown(keep_set.source)}, "
            f"SHA-256 {keep_set.sha256[:16]}), {keeping.feed.batch_size} {often}, weight {keeping.weight:g}, {bound}"
        )
    return None
