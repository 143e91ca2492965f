"""What target_modules=None adapts and steers on a model, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..checkpoints import Checkpoint, as_peft_reads, language_model_targets
from ..prior import ReasoningPrior


def targets_summary(checkpoint: Checkpoint, prior: ReasoningPrior | None = None) -> dict:
    """What `target_modules=None` adapts and steers on this model, from its config alone: no weight is loaded.

    Per module type (q_proj, …): how many modules are adapted, which are those with a Δ if there is a prior; how many
    are steered (None without a prior); and how many other modules of the same name are left alone.

    Raises:
        ValueError: the model has no such module, or none that the prior covers.
    """
    model, projections = checkpoint.model, checkpoint.decoder.projections
    targets = language_model_targets(model, prior)
    hit = as_peft_reads(model, targets)
    adapted = [name for name in projections if name in hit]
    steered = _by_kind(name for name in adapted if prior is not None and projections[name] in prior)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = _by_kind(linear.difference(adapted))
    rows = [
        {"module": kind, "adapted": number, "steered": None if prior is None else steered[kind], "left": left[kind]}
        for kind, number in _by_kind(adapted).items()
    ]
    return {"model": checkpoint.source, "class": type(model).__name__, "target_modules": targets, "rows": rows}


def _by_kind(modules: Iterable[str]) -> Counter:
    """Last part of the modules' names -> how many have it."""
    return Counter(name.rpartition(".")[2] for name in modules)
