"""keep: a model stays near the VLM's own answers while it trains, in any loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from .file import KeepSet
from .train import KEPT, Keeping
from .trainer import KeepCallback, give_to_trainers


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
    """Keep a model near the VLM's own answers while it trains, in any loop whose optimizer is one of torch.

    Nothing of the loop changes. It works on models with DriftConfig, plain PEFT models and full fine-tuning, on bases
    in full precision and quantized ones, under accumulation, gradient checkpointing, mixed precision and DDP, where
    each process takes other samples. Calling it again replaces the settings. Returns the model.

    Args:
        keep_set: the VLM's answers, or where they are; None ends it.
        processor: the VLM's.
        weight: w of w·∇L_keep; at 0 nothing is kept.
        bound: ρ, the most that is added, as a multiple of the task's gradient; None for no bound.
        batch_size: answers a step and process.
        every: only every so many steps of the optimizer.
        seed: of the order of the samples, and of dropout in their forward pass.

    Raises:
        ValueError: a value is out of range, or the keep set belongs to another VLM, tokenizer or processor.
        FileNotFoundError: there is no such keep set.
        RuntimeError: at the first step, under FSDP or DeepSpeed.
    """
    _check(weight, bound, batch_size, every, seed)
    KEPT.pop(model, None)
    if keep_set is None:
        return model
    if isinstance(keep_set, (str, Path)):
        keep_set = KeepSet.load(keep_set)
    if processor is None:
        raise ValueError("keep needs the VLM's processor, which makes inputs of images and questions: pass processor=")
    keep_set.check(processor)
    keep_set.check_model(model)
    if weight > 0:
        give_to_trainers(KeepCallback)
        KEPT[model] = Keeping(model, keep_set, processor, weight, bound, batch_size, every, seed)
    return model


def _check(weight: float, bound: float | None, batch_size: int, every: int, seed: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("every", every, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name, value in (("weight", weight), *((("bound", bound),) if bound is not None else ())):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (name == "bound" and value == 0):
            wanted = "positive, or None for no bound" if name == "bound" else "a finite number of at least 0"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
