"""The distance from the VLM in the logs of transformers' Trainer, and of what is built on it."""

from __future__ import annotations

import gc
import sys

from transformers import TrainerCallback, TrainerState

from .telemetry import keep_telemetry


class KeepCallback(TrainerCallback):
    """Adds `keep_telemetry` as `drift/…` to the training logs of models that are kept, steered or not."""

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            add_to_logs(keep_telemetry(model), logs, state)


def add_to_logs(numbers: dict[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Put numbers as `drift/…` into what is logged of a step, and into `trainer_state.json`."""
    numbers = {f"drift/{name}": value for name, value in numbers.items()}
    logs.update(numbers)
    state.log_history[-1].update(numbers)


def add_to_trainers(callback: type[TrainerCallback]) -> None:
    """Give a callback to every Trainer, once, ahead of the callbacks that report its logs: to those that are made from
    now on, and to those that were made before."""
    made = "transformers.trainer" in sys.modules
    from transformers import trainer  # takes a second to import, so only where something is kept or steered

    if any(getattr(c, "__name__", "") == callback.__name__ for c in trainer.DEFAULT_CALLBACKS):
        return
    trainer.DEFAULT_CALLBACKS.append(callback)
    for each in gc.get_objects() if made else ():  # nothing else lists them
        if issubclass(type(each), trainer.CallbackHandler):
            each.callbacks.insert(0, callback())
