"""The guidance in the logs of transformers' Trainer, and of what is built on it (TRL, LLaMA-Factory)."""

from __future__ import annotations

from transformers import TrainerCallback

from ..keeping import add_to_trainers
from .steered import steered_of
from .telemetry import telemetry


class DriftCallback(TrainerCallback):
    """Adds `telemetry` as `drift/…` to the training logs, and so to TensorBoard, wandb and `trainer_state.json`. Its
    numbers per kind of module only with `drift_log_kinds=True`.

    It registers itself with every Trainer that is made after a model was steered; models that are not are left alone.
    """

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        info = getattr(getattr(train_dataloader, "dataset", None), "info", None)
        name = getattr(info, "dataset_name", None)
        if name == getattr(info, "builder_name", None):  # "json", "imagefolder", …: the format of somebody's own files
            name = None
        for config in {id(s.config): s.config for s in steered_of(model)}.values():
            config.trained_on = name or config.trained_on

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs and (steered := steered_of(model)):
            kinds = any(s.config.drift_log_kinds for s in steered)
            numbers = {f"drift/{name}": value for name, value in telemetry(model).items() if kinds or "/" not in name}
            logs.update(numbers)
            state.log_history[-1].update(numbers)


def register_callback() -> None:
    """Give DriftCallback to every Trainer from now on."""
    add_to_trainers(DriftCallback)
