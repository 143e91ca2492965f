"""What PEFT and transformers load: how many guided steps the weights have had, and whether training goes on guided."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from transformers.integrations.peft import PeftAdapterMixin

from ..warn import warn
from .config import DriftConfig, settings_file
from .patches import in_place_of
from .settings import DriftSettings, listed_modules
from .steered import settings_of
from .unguided import Unguided

ALONE = "PeftModel.from_pretrained(base, folder, config=DriftConfig.from_pretrained(folder), is_trainable=True)"
START = ("drift_start", "init_lora_weights")  # of the past, once there are trained weights
OF_LORA = ("lora_alpha", "alpha_pattern", "use_rslora", "target_modules")
BESIDE = (
    "model.add_adapter('{name}', DriftConfig.from_pretrained(folder)) and then model.load_adapter(folder, '{name}', "
    "is_trainable=True)"
)


@in_place_of(PeftModel, "load_adapter")
def _noticing(
    load_adapter: Callable,
    model: PeftModel,
    model_id: str,
    adapter_name: str,
    is_trainable: bool = False,
    *args,
    **kwargs,
) -> Any:
    """Trainer comes here when it resumes, and for the best checkpoint at the end."""
    own, stored = settings_of(model, adapter_name) if adapter_name in model.peft_config else None, None
    known = own is not None and own.read_from == os.path.realpath(model_id)
    if own is not None and not known and (stored := _settings(model_id, kwargs)):
        _refuse_other_rank(model.peft_config[adapter_name], _lora(model_id, kwargs), model_id)
    result = load_adapter(model, model_id, adapter_name, is_trainable, *args, **kwargs)
    config = settings_of(model, adapter_name)
    way = BESIDE.format(name=adapter_name) if len(model.peft_config) > 1 else ALONE
    if config is not None:
        config.read_from = None
        if known:
            _take_steps(config)
        elif stored:
            config.drift_steps = stored.get("drift_steps", 0)
            if is_trainable:
                _warn_of_other_settings(model, adapter_name, stored, _lora(model_id, kwargs), model_id)
            vars(config).update({name: stored[name] for name in START if name in stored})  # that of these weights
        if is_trainable:
            _warn_of_ended_schedule(config)
    if not (config and is_trainable) and _was_guided(model_id, kwargs):
        Unguided(model.get_base_model(), adapter_name, _plain_training(model_id, way))
    return result


@in_place_of(PeftAdapterMixin, "load_adapter")
def _noticing_without_wrapper(
    load_adapter: Callable, model: PeftAdapterMixin, peft_model_id: str | None = None, *args, **kwargs
) -> Any:
    """The same of transformers' own models, into which it injects adapters without PEFT's wrapper around them."""
    result = load_adapter(model, peft_model_id, *args, **kwargs)
    name = kwargs.get("adapter_name") or next(iter(args), None) or "default"
    if guided := isinstance(config := model.peft_config.get(name), DriftConfig):
        _take_steps(config)
    plain = not (guided and kwargs.get("is_trainable"))
    if peft_model_id is not None and plain and _was_guided(peft_model_id, kwargs):
        Unguided(model, name, _plain_training(peft_model_id, ALONE))
    return result


def _take_steps(config: DriftSettings) -> None:
    if config.steps_of_weights is not None:
        config.drift_steps = config.steps_of_weights


def _settings(source: str, kwargs: dict) -> dict | None:
    hub, _, _ = PeftConfig._split_kwargs(kwargs)
    return DriftConfig.stored(source, **hub)


def _lora(source: str, kwargs: dict) -> LoraConfig:
    hub, _, _ = PeftConfig._split_kwargs(kwargs)
    return LoraConfig.from_pretrained(source, **hub)


def _was_guided(source: str, kwargs: dict) -> bool:
    hub, _, _ = PeftConfig._split_kwargs(kwargs)
    return settings_file(source, **hub) is not None  # unread: what is damaged in it is no matter of inference


def _plain_training(source: str, way: str) -> str:
    return (
        f"The adapter '{source}' was trained with guidance, and without its DriftConfig and is_trainable=True training "
        f"goes on as plain LoRA: load it with {way}, or steer it with guide(model, prior)."
    )


def _refuse_other_rank(own: LoraConfig, stored: LoraConfig, source: str) -> None:
    for name in ("r", "rank_pattern"):
        if (there := getattr(stored, name)) != (here := getattr(own, name)):
            raise ValueError(
                f"The adapter in '{source}' has {name}={there!r}, and the model was wrapped with {name}={here!r}: wrap "
                "it as the adapter was."
            )


def _warn_of_other_settings(
    model: PeftModel, adapter_name: str, stored: dict, stored_lora: LoraConfig, source: str
) -> None:
    """As Trainer compares the arguments of a checkpoint with its own."""
    config, lora = settings_of(model, adapter_name), model.peft_config[adapter_name]
    earlier = DriftSettings(**{name: stored[name] for name in stored.keys() & DriftSettings.__dataclass_fields__})
    past = ("drift_steps",) if config.drift_start else ("drift_steps", "drift_start")  # unless one was asked for now
    names = [name for name in stored if name.startswith("drift_") and name not in past]
    changed = [name for name in names if _meant(earlier, name) != _meant(config, name)]
    differences = [f"{name}={stored[name]!r}, which is {getattr(config, name)!r} now" for name in changed]
    differences += [
        f"{name}={there!r}, which is {here!r} now"
        for name in OF_LORA
        if (there := getattr(stored_lora, name)) != (here := getattr(lora, name))
    ]
    if earlier.prior_sha256 != config.prior_sha256:
        differences = [
            f"another prior than '{config.prior}'" if config.prior else "a prior, and has none now",
            *differences,
        ]
    if differences:
        warn(
            f"The adapter in '{source}' was trained with {', and with '.join(differences)}: unless that is meant, wrap "
            "the model as it was."
        )


def _meant(config: DriftSettings, name: str) -> Any:
    """A setting in one of several forms that mean the same."""
    if name == "drift_sketch" and config.drift_norm != "weight":
        return None
    if name == "drift_spectrum":
        return config.spectrum_power
    value = getattr(config, name)
    if name == "drift_modules":
        return None if value is None else sorted(listed_modules(value))
    return value


def _warn_of_ended_schedule(config: DriftConfig) -> None:
    warmup, decay = config.drift_warmup_steps, config.drift_decay_steps
    if decay is not None and config.drift_steps >= warmup + decay:
        warn(
            f"The adapter has had {config.drift_steps} guided steps, and its strength ended after {warmup + decay}, so "
            "training goes on as plain LoRA: load it with a longer drift_decay_steps, or None, to steer it again."
        )
