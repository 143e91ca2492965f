"""A callback of transformers' Trainer that steers and keeps the model which it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..keeping import KeepCallback, add_to_trainers
from ..tuner import DriftCallback
from .settings import PluginSettings


class SteerCallback(TrainerCallback):
    """Steers and keeps a Trainer's model as soon as the Trainer is made: whoever wraps it with LoRA has done so then.

    Args:
        settings: of guidance and keeping.
        processor: what makes the model's processor; asked only if something is kept.
    """

    def __init__(self, settings: PluginSettings, processor: Callable[[], Any]):
        self.settings, self.processor = settings, processor
        for callback in (DriftCallback, KeepCallback):  # their numbers in the logs of the Trainer that is made next
            add_to_trainers(callback)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.settings.guide(model)
        if self.settings.keeps:
            self.settings.keep(model, self.processor())
