"""The guidance in the logs of transformers' Trainer, and of what is built on it (TRL, LLaMA-Factory)."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..keeping import add_to_logs
from .steered import steered_of
from .telemetry import of_steered


class DriftCallback(TrainerCallback):
    """Adds `telemetry` as `drift/…` to the training logs, and so to TensorBoard, wandb and `trainer_state.json`. Its
    numbers per kind of module only with `drift_log_kinds=True`; those of keeping come with `KeepCallback`.

    It registers itself with every Trainer that is made after a model was steered; models that are not are left alone.
    """

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        info = getattr(getattr(train_dataloader, "dataset", None), "info", None)
        name = getattr(info, "dataset_name", None)
        if name == getattr(info, "builder_name", None):  # "json", "imagefolder", …: the format of somebody's own files
            name = None
        for config in {id(s.config): s.config for s in steered_of(model)}.values():
            config.trained_on = name or config.trained_on
            config.training = _training(args, state)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs and (steered := steered_of(model)):
            kinds, numbers = any(s.config.drift_log_kinds for s in steered), of_steered(steered, steered)
            add_to_logs({name: value for name, value in numbers.items() if kinds or "/" not in name}, logs, state)


def _training(args: TrainingArguments, state: TrainerState) -> str:
    """The settings of a run in words, for the model card."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule, optimizer = (getattr(value, "value", value) for value in (args.lr_scheduler_type, args.optim))
    warm_up = f", {steps} warm-up steps" if (steps := args.get_warmup_steps(state.max_steps)) else ""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return (
        f"{state.max_steps} steps of {samples} samples, learning rate {args.learning_rate:g} ({schedule}{warm_up}), "
        f"{optimizer}, weight decay {args.weight_decay:g}, {precision}, seed {args.seed}"
    )
