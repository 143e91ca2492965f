"""LLaMA-Factory's own training, steered. Its YAML has no place for others' code, so the training is started here:

    python -m drift_peft.integrations.llama_factory train config.yaml [key=value …]
    torchrun --nproc-per-node 2 -m drift_peft.integrations.llama_factory train config.yaml    # several GPUs

in the place of `llamafactory-cli train`. config.yaml is LLaMA-Factory's, with the `drift_…` keys beside its own:

    finetuning_type: lora
    drift_prior: prior.safetensors
    drift_alpha: 0.3

With USE_V1=1, LLaMA-Factory's new trainer is started, where they stand in the block of its plugin:

    peft_config: {name: drift, r: 16, lora_alpha: 32, drift_prior: prior.safetensors}
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial

from peft import PeftModel, get_peft_model
from transformers import AutoProcessor

from .settings import PluginSettings
from .steer import NOT_STEERED, SteerCallback

try:
    from llamafactory.extras.misc import is_env_enabled, use_ray
except ImportError as error:
    raise ImportError(
        "drift_peft.integrations.llama_factory starts the training of LLaMA-Factory, which cannot be imported here "
        f"({error}): install llamafactory beside drift_peft."
    ) from error


# Of the block of its own plugin `lora`: for `merge`, which is another command's.
EXPORT = ("export_dir", "export_size", "export_hub_model_id", "export_legacy_format", "infer_dtype")


def train() -> None:
    """`llamafactory-cli train`, with the model steered as soon as its Trainer is made.

    Raises:
        ValueError: as of PluginSettings.read, or a way of training that makes no Trainer with callbacks.
        RuntimeError: one of these was not known as such.
    """
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    values = read_args()
    if not isinstance(values, dict):
        raise ValueError("The settings must come in a file, config.yaml or config.json, with changes as key=value.")
    settings = PluginSettings.read(values)
    own = {key: value for key, value in values.items() if not key.startswith("drift_")}
    if own.get("stage") == "ppo":
        raise ValueError("stage: ppo makes no Trainer of transformers, so nothing would be steered: take sft or dpo.")
    if is_env_enabled("USE_MEGATRON_BRIDGE"):
        raise ValueError("USE_MEGATRON_BRIDGE trains without callbacks, so nothing would be steered: unset it.")
    processor = partial(AutoProcessor.from_pretrained, own.get("model_name_or_path"))
    callback = SteerCallback(settings, processor)
    run_exp(own, callbacks=[callback] if own.get("do_train") else None)  # with do_eval alone, nothing is trainable
    if own.get("do_train") and not callback.steered and not use_ray():  # Ray's workers have copies of it
        raise RuntimeError(NOT_STEERED)


def train_v1(command: str) -> None:
    """`USE_V1=1 llamafactory-cli sft`, `rm` or `dpo`, with the plugin `drift` beside its `lora` and `freeze`."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    PeftPlugin("drift").register()(adapt)
    _trainer_v1(command)()


def _trainer_v1(command: str) -> Callable | None:
    """What trains; None where this LLaMA-Factory has only its file, as 0.9.5 has of `dpo`."""
    name = {"train": "sft"}.get(command, command)
    return getattr(importlib.import_module(f"llamafactory.v1.trainers.{name}_trainer"), f"run_{name}", None)


def adapt(model, config: dict, is_train: bool = False):
    """LLaMA-Factory's PeftPlugin: the model with a steered LoRA adapter, new or from `adapter_name_or_path`.

    Raises:
        ValueError: as of PluginSettings.read and DriftConfig, or more than one adapter.
    """
    settings = PluginSettings.read(config)
    others = ("name", *EXPORT)
    lora = {key: value for key, value in config.items() if key not in others and not key.startswith("drift_")}
    adapters = lora.pop("adapter_name_or_path", None) or []
    adapters = [adapters] if isinstance(adapters, str) else adapters
    if len(adapters) > 1:
        raise ValueError(f"adapter_name_or_path names {len(adapters)} adapters: merge all but the last one first.")
    if not is_train:
        return PeftModel.from_pretrained(model, adapters[0]) if adapters else model
    if adapters:
        model = settings.load(model, adapters[0])
    else:
        if isinstance(targets := lora.get("target_modules"), str):  # PEFT takes it for a regular expression
            lora["target_modules"] = None if targets == "all" else [targets]  # None: what the prior covers
        model = get_peft_model(model, settings.config(task_type=_task_type(model), **lora))
    settings.keep(model, partial(AutoProcessor.from_pretrained, model.name_or_path))
    return model


def _task_type(model) -> str:
    kinds = {"ForTokenClassification": "TOKEN_CLS", "ForSequenceClassification": "SEQ_CLS"}  # `rm` trains the first
    return next((kind for end, kind in kinds.items() if type(model).__name__.endswith(end)), "CAUSAL_LM")


def main() -> None:
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    v1 = is_env_enabled("USE_V1")
    known = [name for name in ("train", "sft", "rm", "dpo") if _trainer_v1(name)] if v1 else ["train"]
    if command not in known:
        lora = "name: lora" if v1 else "finetuning_type: lora"
        sys.exit(
            f"The command must be {' or '.join(known)}, got '{command}': for others, give the adapter, which is plain "
            f"LoRA, to llamafactory-cli with {lora} and without the drift_… keys."
        )
    train_v1(command) if v1 else train()


if __name__ == "__main__":
    main()
