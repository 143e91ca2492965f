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

import sys
from functools import partial

from peft import PeftModel, get_peft_model
from transformers import AutoProcessor

from ..tuner import DriftConfig
from .settings import PluginSettings
from .steer import SteerCallback

try:
    from llamafactory.extras.misc import is_env_enabled
except ImportError as error:
    raise ImportError(
        "drift_peft.integrations.llama_factory starts the training of LLaMA-Factory, which cannot be imported here "
        f"({error}): install llamafactory beside drift_peft."
    ) from error


def train() -> None:
    """`llamafactory-cli train`, with the model steered as soon as its Trainer is made."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    values = read_args()
    if not isinstance(values, dict):
        raise ValueError("The settings must come in a file, config.yaml or config.json, with changes as key=value.")
    settings = PluginSettings.read(values)
    own = {key: value for key, value in values.items() if not key.startswith("drift_")}
    processor = partial(AutoProcessor.from_pretrained, own.get("model_name_or_path"))
    run_exp(own, callbacks=[SteerCallback(settings, processor)])


def train_v1(command: str) -> None:
    """`USE_V1=1 llamafactory-cli sft` or `rm`, with the plugin `drift` beside its `lora` and `freeze`."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    from llamafactory.v1.trainers import rm_trainer, sft_trainer

    PeftPlugin("drift").register()(adapt)
    (rm_trainer.run_rm if command == "rm" else sft_trainer.run_sft)()


def adapt(model, config: dict, is_train: bool = False):
    """LLaMA-Factory's PeftPlugin: the model with a steered LoRA adapter, new or from `adapter_name_or_path`."""
    settings = PluginSettings.read(config)
    lora = {key: value for key, value in config.items() if key != "name" and not key.startswith("drift_")}
    adapter = lora.pop("adapter_name_or_path", None)
    if not is_train:
        return model if adapter is None else PeftModel.from_pretrained(model, adapter)
    if adapter is None:
        if lora.get("target_modules") == "all":
            lora["target_modules"] = None  # what the prior covers
        model = get_peft_model(model, settings.config(task_type="CAUSAL_LM", **lora))
    else:
        config = DriftConfig.from_pretrained(adapter, **settings.guidance)
        model = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
    if settings.keeps:
        settings.keep(model, AutoProcessor.from_pretrained(model.name_or_path))
    return model


def main() -> None:
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    known = ("train", "sft", "rm") if is_env_enabled("USE_V1") else ("train",)
    if command not in known:
        sys.exit(f"The command must be {' or '.join(known)}, got '{command}': for others, use llamafactory-cli.")
    train_v1(command) if is_env_enabled("USE_V1") else train()


if __name__ == "__main__":
    main()
