"""guide: a model that something else has wrapped, or that is trained in full, is steered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel, PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn

from ..arguments import check_type, nearest
from ..checkpoints import module_kind
from ..keeping import inner_model, keep_4bit_differentiable
from ..prior import ReasoningPrior, origins_of
from ..warn import warn
from .attach import refuse_meta, steer
from .compatibility import (
    adapted_modules,
    check_fit,
    check_weights,
    refuse_other_targets,
    refuse_tied_adapters,
    targeted_modules,
)
from .config import STARTS, DriftConfig
from .modules_to_save import refuse_nested_copies
from .start import refuse_to_start, start_adapters
from .steered import TrainedTensor, lora_factor, lora_layers, trainable_tensors

PLAIN_VARIANTS = ("ALoraLinearVariant", "VeloraLinearVariant")  # those that act on the weight as W + s·B·A too


def guide(
    model: nn.Module,
    prior: ReasoningPrior | str | Path | None = None,
    adapter_name: str | None = None,
    *,
    init_lora_weights: Literal["drift"] | None = None,
    **settings,
) -> nn.Module:
    """Steer a model that was wrapped elsewhere (PEFT, TRL, Unsloth, LLaMA-Factory), or that is trained in full.

    Everything trainable that has a Δ in the prior is steered: the LoRA adapters, and tensors that are trained
    themselves, such as all weights of a model without adapters (the paper's own setting). A PeftModel saves its adapter
    as plain LoRA, with these settings beside it as those of a `DriftConfig`. Calling it again replaces the settings.
    Returns the model. At each optimizer step the bias of DRIFT (arXiv 2510.15050, equations 3 and 4) is subtracted from
    the gradients, which are then complete.

    Tensors that are trained themselves are steered by what is still missing, Δ − (W − W_0), and so a copy of W_0 is
    kept beside them; the paper's constant direction, drift_target="delta", needs none.

    Args:
        prior: what steers; None only with drift_target="base".
        adapter_name: the LoRA adapter to steer; every active one if None.
        init_lora_weights: "drift" gives an adapter that nothing has trained yet the start of a `DriftConfig`, and
            `drift_start` of Δ; call it before the optimizer is made. None leaves the start as it is.
        settings: the `drift_…` fields of `DriftConfig`.

    Raises:
        TypeError: an unknown setting.
        ValueError: nothing that is trainable here has a Δ in the prior; the adapter is not LoRA; the model uses a LoRA
            variant with another chain rule, starts with a part of W in its adapter, was wrapped with DriftConfig, or
            does not fit the prior; a start is asked for, and the adapter is trained or sharded already; what comes
            first is no model; or a setting is out of range.

    Example:
        >>> targets = language_model_targets(vlm)
        >>> model = get_peft_model(vlm, LoraConfig(r=8, target_modules=targets))  # or Unsloth's, or TRL's
        >>> model = guide(model, "prior.safetensors", init_lora_weights="drift", drift_alpha=0.3)
        >>> train(model)
        >>> telemetry(model)["guided_steps"]
        2
    """
    _check_arguments(model, prior, adapter_name, init_lora_weights, settings)
    if isinstance(prior, (str, Path)):
        prior = ReasoningPrior.load(prior)
    given, model = model, inner_model(model)
    refuse_meta(model)
    refuse_nested_copies(model)
    layers, tensors = list(lora_layers(model, adapter_name)), list(trainable_tensors(model, adapter_name))
    _refuse_nothing(model, prior, adapter_name, layers, tensors)
    if (share := settings.get("drift_start")) and init_lora_weights is None:
        lacks = "guide() leaves an adapter its own start: add init_lora_weights='drift', or leave out drift_start"
        lacks = lacks if layers else "there is none here: leave it out"
        raise ValueError(f"drift_start={share!r} puts a part of Δ into a new adapter, and {lacks}.")
    config = DriftConfig(
        prior=None if prior is None else prior.source,
        prior_sha256=None if prior is None else prior.sha256,
        r=max((layer.r[adapter] for _, layer, adapter in layers), default=1),
        init_lora_weights=init_lora_weights or True,
        **settings,
    )
    config.origins = () if prior is None else origins_of(prior.metadata)
    _refuse_adapters(model, prior, layers, config)
    if init_lora_weights is not None:
        refuse_to_start(layers, prior, config.drift_start)
    keep_4bit_differentiable(model)
    ranks: dict[str, int] = {}  # of several adapters on one weight, the lowest
    for name, layer, adapter in layers:
        ranks[name] = min(layer.r[adapter], ranks.get(name, layer.r[adapter]))
    check_fit(model, prior, config, ranks, [tensor.name for tensor in tensors])
    _warn_of_frozen(layers)
    own_name = adapter_name or min((adapter for *_, adapter in layers), default="")
    steered = steer(layers, tensors, prior, config, own_name)
    if init_lora_weights is not None:
        start_adapters(steered, prior)
    return given


def _check_arguments(
    model: Any,
    prior: ReasoningPrior | str | Path | None,
    adapter_name: str | None,
    init_lora_weights: str | None,
    settings: dict[str, Any],
) -> None:
    """Refuse by name and value what the arguments alone show."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"guide() takes the model first, then the prior, but got {type(model).__name__} as model.")
    check_type("prior", prior, ReasoningPrior | str | Path | None)
    check_type("adapter_name", adapter_name, str | None)
    known = [name for name in DriftConfig.__dataclass_fields__ if name.startswith("drift_") and name != "drift_steps"]
    if unknown := next((name for name in settings if name not in known), None):
        words = (
            f"guide() takes the drift_… settings of DriftConfig, but got '{unknown}'",
            nearest(unknown, ["init_lora_weights", *known]),
        )
        raise TypeError("; ".join(filter(None, words)))
    if prior is None and settings.get("drift_target") != "base":
        raise ValueError(
            "guide() was given no prior to steer by: build one with build_prior(expert, base, output) and give its "
            "path; without a prior it only holds a model at its base, with drift_scale='decoupled' and "
            "drift_target='base'."
        )
    if init_lora_weights not in (None, "drift"):
        raise ValueError(
            f"guide() gives an adapter the start 'drift', or leaves it its own (None), but got init_lora_weights="
            f"{init_lora_weights!r}."
        )


def _refuse_nothing(
    model: nn.Module,
    prior: ReasoningPrior | None,
    adapter_name: str | None,
    layers: list[tuple[str, LoraLayer, str]],
    tensors: list[TrainedTensor],
) -> None:
    """There must be something to steer, and the adapter that is named."""
    if not layers and not any(prior is None or tensor.name in prior for tensor in tensors):
        _refuse_other_methods(model, adapter_name)
    if adapter_name is not None and not layers:
        raise ValueError(f"The model has no adapter '{adapter_name}': wrap it with get_peft_model first.")
    if not layers and not tensors:
        raise ValueError(
            "The model has no LoRA layers on its language model, and nothing of that is trainable: wrap it with "
            "get_peft_model, or set requires_grad for what shall be trained in full."
        )


def _refuse_adapters(
    model: nn.Module, prior: ReasoningPrior | None, layers: list[tuple[str, LoraLayer, str]], config: DriftConfig
) -> None:
    """Each must be plain LoRA, on what its LoraConfig names, and on weights of its own."""
    for name, layer, adapter in layers:
        if prior is None or module_kind(name):
            _refuse_layer(model, name, layer, adapter, config)
    adapters, own = {adapter for *_, adapter in layers}, {layer for _, layer, _ in layers}
    named = [(name, module) for name, module in model.named_modules() if module in own]
    check_weights(model, [f"{name}.{getattr(layer, 'parameter_name', 'weight')}" for name, layer in named])
    _refuse_misread_targets(model, adapters)
    if config.drift_target != "delta":
        _refuse_starts(model, adapters)


def _warn_of_frozen(layers: list[tuple[str, LoraLayer, str]]) -> None:
    """PEFT loads an adapter frozen, unless is_trainable says otherwise; one that is not active waits for its turn."""
    active = [(layer, adapter) for _, layer, adapter in layers if adapter in layer.active_adapters]
    factors = [lora_factor(layer, factor, adapter) for layer, adapter in active for factor in "AB"]
    if factors and not any(factor.requires_grad for factor in factors):
        adapters = ", ".join(sorted({f"'{adapter}'" for _, adapter in active}))
        warn(
            f"The adapter {adapters} is frozen, so that no step trains or steers it: load it with is_trainable=True, "
            "or call set_adapter."
        )


def _refuse_other_methods(model: nn.Module, adapter_name: str | None) -> None:
    """Of their adapters no more can be steered than modules to save."""
    configs = getattr(model, "peft_config", {})
    active = model.active_adapters if isinstance(model, PeftModel) else configs
    for adapter in active if adapter_name is None else [adapter_name]:
        if adapter in configs and (method := configs[adapter].peft_type) != PeftType.LORA:
            raise ValueError(
                f"The adapter '{adapter}' is {method.value}: guidance steers LoRA's factors, so make it with "
                "LoraConfig or DriftConfig."
            )


def _refuse_misread_targets(model: nn.Module, adapters: Iterable[str]) -> None:
    if not isinstance(model, PeftModel):
        return
    base = model.get_base_model()
    for adapter in adapters:
        config = model.peft_config[adapter]
        refuse_tied_adapters(base, config, adapted_modules(base, [adapter]))
        if config.target_modules is not None:
            intended = targeted_modules(base, config)
            refuse_other_targets(base, config.target_modules, intended, adapted_modules(base, [adapter]))


def _refuse_starts(model: nn.Module, adapters: Iterable[str]) -> None:
    """Whatever pulls at s·B·A would pull at a part of W where the start has put it there."""
    for adapter in adapters:
        start = getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", True)
        if start not in STARTS:
            raise ValueError(
                f"The adapter '{adapter}' starts with init_lora_weights={start!r}, which moves a part of the base "
                "weights into it, and guidance would pull that out: start it otherwise, or use drift_target='delta'."
            )


def _refuse_layer(model: nn.Module, name: str, layer: LoraLayer, adapter: str, config: DriftConfig) -> None:
    if isinstance(layer, AdaLoraLayer):  # with other parameters, and a rank that changes
        raise ValueError(f"{name} is adapted by AdaLoRA: guidance steers LoRA's factors, so make it with LoraConfig.")
    variant = type(layer.lora_variant.get(adapter)).__name__
    if adapter in layer.lora_variant and variant not in PLAIN_VARIANTS:
        raise ValueError(f"{name} uses {variant}, whose chain rule is not plain LoRA's: train it without guidance.")
    divided_by_it = {"drift_target='factors'": config.drift_target == "factors", "drift_start": config.drift_start}
    if layer.scaling[adapter] <= 0 and (named := [setting for setting, is_set in divided_by_it.items() if is_set]):
        raise ValueError(
            f"{name} has the LoRA scaling {layer.scaling[adapter]}, and {named[0]} divides by it: leave out "
            f"{' and '.join(named)}."
        )
    current = vars(layer).get("drift_peft", {}).get(adapter)
    if current is not None and current.config in getattr(model, "peft_config", {}).values():
        raise ValueError(f"The adapter '{adapter}' is steered by its DriftConfig already: change the settings there.")
