"""What keep does, in the logs of transformers' Trainer, and of what is built on it (TRL, LLaMA-Factory)."""

from __future__ import annotations

from transformers import TrainerCallback

from .train import keeping_of


class KeepCallback(TrainerCallback):
    """Adds `drift/keep_kl` and `drift/keep_ratio` to the training logs of a model that is kept."""

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs and (keeping := keeping_of(model)):
            numbers = {f"drift/{name}": value for name, value in keeping.numbers().items()}
            logs.update(numbers)
            state.log_history[-1].update(numbers)


def give_to_trainers(callback: type[TrainerCallback]) -> None:
    """Give a callback to every Trainer from now on, ahead of the callbacks that report its logs."""
    from transformers import trainer  # takes a second to import, so only where something is guided or kept

    if not any(getattr(c, "__name__", "") == callback.__name__ for c in trainer.DEFAULT_CALLBACKS):
        trainer.DEFAULT_CALLBACKS.append(callback)
