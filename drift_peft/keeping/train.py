"""keep: a model that trains stays near the VLM, without a word in the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_type, check_whole, is_number, plain
from .file import KeepSet
from .four_bit import keep_4bit_differentiable
from .inner import inner_model
from .kept import Keeping, end_keeping, keepings_of
from .trainer import KeepCallback, add_to_trainers


def keep(
    model: nn.Module,
    keep_set: KeepSet | str | Path | None,
    processor: Any = None,
    weight: float = 1.0,
    bound: float | None = 1.0,
    batch_size: int = 8,
    every: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Keep a model near the VLM whose answers a keep set holds, from its next optimizer step on.

    Before each step, k = w·∇L_keep of a fresh batch of the keep set is added to the gradients g of whatever the
    optimizer trains: g ← g + k·min(1, ρ·‖g‖/‖k‖). L_keep is the mean KL(VLM || model) over the answer tokens, in nats.
    This is ours, not of the paper. No loop, trainer or loss has to know of it: LoRA, steered or not, and full
    fine-tuning, with plain PyTorch, Trainer, TRL, accelerate or DDP. Calling it again replaces the settings;
    `keep(model, None)` or weight=0 ends it. Returns the model.

    Args:
        model: as the training loop calls it.
        keep_set: from `make_keep_set`; or its file, folder or hub id.
        processor: of the model.
        weight: w.
        bound: ρ; what is added is at most ρ times as long as the gradient. None: no limit.
        batch_size: answers a step, in each process.
        every: keep at every n-th step only.
        seed: of the order of the keep set, and of dropout there. An optimizer that is resumed goes on in this order.

    Raises:
        ValueError: the set was made with another processor, tokenizer or type of model; what comes first is no model;
            or a value is out of range.
        FileNotFoundError: there is no such keep set.

    Example:
        >>> model = get_peft_model(vlm, DriftConfig(prior="prior.safetensors", r=8, task_type="CAUSAL_LM"))
        >>> model = keep(model, "keep.safetensors", processor, batch_size=2)
        >>> train(model)
        >>> telemetry(model)["keep_kl"] > 0  # nats an answer token
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"keep() takes the model first, then the keep set, but got {type(model).__name__} as model")
    weight, bound, batch_size, every, seed = plain((weight, bound, batch_size, every, seed))
    check_type("keep_set", keep_set, KeepSet | str | Path | None)
    if not is_number(weight) or weight < 0:
        raise ValueError(f"weight must be a number ≥ 0, got {weight!r}")
    if bound is not None and (not is_number(bound) or bound <= 0):
        raise ValueError(f"bound must be a number > 0, or None for no bound, got {bound!r}")
    check_whole(batch_size=batch_size, every=every)
    check_whole(0, seed=seed)
    kept = inner_model(model)  # a pass of its own is not what DDP waits for, or what was compiled
    if keep_set is None or weight == 0:
        end_keeping(kept)
        return model
    if processor is None:
        raise ValueError("keep() needs the model's processor, which turns questions and images into its inputs")
    if isinstance(keep_set, (str, Path)):
        keep_set = KeepSet.load(keep_set)
    keep_set.check(processor)
    keep_set.check_model(kept)
    for keeping in keepings_of(kept):
        keeping.release()
    keep_4bit_differentiable(kept)
    Keeping(kept, keep_set, processor, float(weight), bound, batch_size, every, seed)
    add_to_trainers(KeepCallback)
    return model
