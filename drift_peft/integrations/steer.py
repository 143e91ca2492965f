"""A callback of transformers' Trainer that steers and keeps the model which it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..keeping import KeepCallback, add_to_trainers
from ..tuner import DriftCallback
from .settings import PluginSettings

NOT_STEERED = (
    "Nothing was steered or kept: this training does not make its Trainer with the callbacks that it is given. Take "
    "another way of training, or leave out the drift_… keys."
)


class SteerCallback(TrainerCallback):
    """Steers and keeps a Trainer's model as soon as the Trainer is made: whoever wraps it with LoRA has done so then.

    Args:
        settings: of guidance and keeping.
        processor: what makes the model's processor; asked only if something is kept.

    Attributes:
        steered: whether a Trainer was made with it.

    Raises:
        RuntimeError: a training loop begins that is not that of a Trainer.
    """

    def __init__(self, settings: PluginSettings, processor: Callable[[], Any]):
        self.settings, self.processor, self.steered = settings, processor, False
        for callback in (DriftCallback, KeepCallback):  # their numbers in the logs of the Trainer that is made next
            add_to_trainers(callback)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.settings.guide(model)
        self.settings.keep(model, self.processor)
        self.steered = True

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.steered:  # such as LLaMA-Factory's PPO
            raise RuntimeError(NOT_STEERED)
