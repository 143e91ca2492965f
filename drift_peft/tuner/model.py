"""DriftModel: PEFT's LoraModel whose layers know the prior that steers them; `guide` for models wrapped elsewhere."""

from __future__ import annotations

import copy
import functools
import re
import sys
import warnings
from collections.abc import Iterable

import torch
from peft import PeftModel, mixed_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..checkpoints import canonical_name, language_model_targets, module_kind, quantization_of
from ..prior import ReasoningPrior
from . import guidance
from .config import DriftConfig
from .fit import check_fit
from .settings import check_patterns_used, is_guided
from .sharding import values
from .steered import SteeredAdapter, SteeredTensor, lora_layers, steered_of, trainable_tensors
from .trainer import register_callback

PLAIN_VARIANTS = ("ALoraLinearVariant", "VeloraLinearVariant")  # those that act on the weight as W + s·B·A too
ZERO_STARTS = ("drift", True, "gaussian", "eva")  # starts with lora_B = 0


class DriftModel(LoraModel):
    """What `get_peft_model(model, DriftConfig(…))` makes. The forward pass is PEFT's own; gradients are guided.

    Plain `LoraConfig`s pass through as in LoraModel, in models of their own and beside a DriftConfig.

    Raises:
        ValueError: the prior belongs to another model, or none of the targets has a Δ. The model is then untouched.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        trains = isinstance(config, DriftConfig) and not config.inference_mode
        if trains:  # before anything is forgotten: what is refused stays as it is
            _refuse_unready(model, adapter_name, kwargs.get("low_cpu_mem_usage", False))
        _forget(model.modules(), adapter_name)  # one of this name may have been deleted, past this class even
        if not isinstance(config, DriftConfig):
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not trains:
            if config.target_modules is None:
                config.target_modules = language_model_targets(model)
            return super().inject_adapter(model, adapter_name, *args, **kwargs)

        # A copy: what is filled in below belongs to this model, and the user may wrap another one with the same config.
        config = self.peft_config[adapter_name] = copy.copy(config)
        config.quantization = quantization_of(model)
        prior = None if config.prior is None else _open_prior(config)
        keep_4bit_differentiable(model)
        if config.target_modules is None:
            config.target_modules = language_model_targets(model, prior, config.layers_to_transform)
            config.layers_to_transform = None  # it is in the expression, and PEFT refuses both
        _maybe_include_all_linear_layers(config, model)
        names = [name for name, _ in model.named_modules() if self._check_target_module_exists(config, name)]
        if prior is not None:
            check_fit(model, prior, config, {name: _rank(config, name) for name in names}, _tensors(config, prior))
        else:
            known = {canonical_name(name) for name, _ in model.named_parameters()} - {None}
            targets = known.intersection(canonical_name(f"{name}.weight") for name in names)
            check_patterns_used(config, sorted(targets) + _tensors(config, known))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        tensors = [t for t in trainable_tensors(model, adapter_name) if config.bias != "none" or t[-1] is not None]
        adapters = _steer(list(lora_layers(model, adapter_name)), tensors, prior, config, adapter_name)
        if config.init_lora_weights == "drift":
            _start(adapters, prior)

    def _create_and_replace(self, lora_config, *args, **kwargs) -> None:
        if isinstance(lora_config, DriftConfig) and lora_config.init_lora_weights == "drift":
            # PEFT's layers refuse a start that they do not know; ours comes after them.
            lora_config = copy.copy(lora_config)
            lora_config.init_lora_weights = True
        super()._create_and_replace(lora_config, *args, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], *args, **kwargs) -> None:
        """PEFT's own; the mixture is plain LoRA, whatever steered its parts."""
        configs = dict(self.peft_config)
        self.peft_config.update({name: c.to_lora() for name, c in configs.items() if isinstance(c, DriftConfig)})
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config.update(configs)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        modules = list(self.model.modules())  # LoRA layers are replaced; biases and modules to save stay in the model
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for adapter_name in self.peft_config:
            _forget(modules, adapter_name)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        modules = list(self.model.modules())  # copies of modules to save are removed
        super().delete_adapter(adapter_name)
        _forget(modules, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict, **kwargs):
        config.weights_loaded = True  # no field of the config, so it is not stored
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, **kwargs):
        """What is saved. An adapter that moved without a single guided step is said loudly, not only stored."""
        weights = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        starts_at_zero = config.init_lora_weights in ZERO_STARTS and not getattr(config, "weights_loaded", False)
        guided = [s for s in steered_of(model) if s.adapter == adapter_name and s.alpha]
        if starts_at_zero and guided and not any(int(s.config.drift_steps) for s in guided):
            if any(weight.any() for name, weight in weights.items() if ".lora_B." in name):
                warnings.warn(
                    f"The adapter '{adapter_name}' was trained, but the guidance never ran: its optimizer does not "
                    "call the step hooks of torch.optim, or trains copies of the parameters. It is plain LoRA.",
                    stacklevel=2,
                )
        return weights


def guide(
    model: nn.Module, prior: ReasoningPrior | str | None = None, adapter_name: str | None = None, **settings
) -> nn.Module:
    """Steer a model that was wrapped elsewhere (PEFT, TRL, Unsloth, LLaMA-Factory), or that is trained in full.

    Everything trainable that has a Δ in the prior is steered: the LoRA adapters, and tensors that are trained
    themselves, such as all weights of a model without adapters (the paper's own setting). An adapter's start stays as
    it is, and so does what it saves. Calling it again replaces the settings. Returns the model.

    Tensors that are trained themselves are steered by what is still missing, Δ − (W − W_0), and so a copy of W_0 is
    kept beside them; the paper's constant direction, drift_target="delta", needs none.

    Args:
        prior: what steers; None only with drift_target="base".
        adapter_name: the LoRA adapter to steer; every active one if None.
        settings: the `drift_…` fields of `DriftConfig`.

    Raises:
        TypeError: an unknown setting.
        ValueError: nothing that is trainable here has a Δ in the prior; the model uses a LoRA variant with another
            chain rule, was wrapped with DriftConfig, or does not fit the prior; or a setting is out of range.
    """
    if prior is not None and not isinstance(prior, ReasoningPrior):
        prior = ReasoningPrior.load(prior)
    if foreign := next((name for name in settings if not name.startswith("drift_") or name == "drift_steps"), None):
        raise TypeError(f"guide() takes the drift_… settings of DriftConfig, but got '{foreign}'.")
    _refuse_meta(model)
    layers = list(lora_layers(model, adapter_name))
    if adapter_name is not None and not layers:
        raise ValueError(f"The model has no adapter '{adapter_name}': wrap it with get_peft_model first.")
    config = DriftConfig(
        prior=None if prior is None else prior.source,
        prior_sha256=None if prior is None else prior.sha256,
        r=max((layer.r[adapter] for _, layer, adapter in layers), default=1),
        **settings,
    )
    for name, layer, adapter in layers:
        _refuse_layer(model, name, layer, adapter, config)
    keep_4bit_differentiable(model)
    adapters = {adapter for _, _, adapter in layers}
    targets = {
        name: min(layer.r[a] for a in adapters.intersection(layer.r))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapters.intersection(layer.r)
    }
    tensors = list(trainable_tensors(model))
    if not layers and not tensors:
        raise ValueError(
            "The model has no LoRA layers on its language model, and nothing of that is trainable: wrap it with "
            "get_peft_model, or set requires_grad for what shall be trained in full."
        )
    if prior is not None:
        check_fit(model, prior, config, targets, [name for name, _, _, _ in tensors])
    else:
        check_patterns_used(config, [name for name, *_ in [*layers, *tensors]])
    _steer(layers, tensors, prior, config, adapter_name or next(iter(sorted(adapters)), ""))
    return model


def _unmixed(check):
    """PEFT's models of mixed adapter types make their layers past DriftModel, so nothing there would be guided."""

    @functools.wraps(check)
    def wrapper(config):
        if isinstance(config, DriftConfig):
            raise ValueError(
                "DriftConfig is not guided beside other adapter types (mixed=True): leave out mixed=True, or use "
                "peft.LoraConfig for an adapter without guidance."
            )
        return check(config)

    return wrapper


mixed_model._check_config_compatible = _unmixed(mixed_model._check_config_compatible)  # what PEFT asks first


def _refuse_layer(model: nn.Module, name: str, layer: LoraLayer, adapter: str, config: DriftConfig) -> None:
    variant = type(layer.lora_variant.get(adapter)).__name__
    if adapter in layer.lora_variant and variant not in PLAIN_VARIANTS:
        raise ValueError(f"{name} uses {variant}, whose chain rule is not plain LoRA's: train it without guidance.")
    if config.drift_target == "factors" and layer.scaling[adapter] <= 0:
        raise ValueError(
            f"{name} has the LoRA scaling {layer.scaling[adapter]}, but drift_target='factors' divides by it: use "
            "drift_target='residual'."
        )
    current = getattr(layer, "drift", {}).get(adapter)
    if current is not None and current.config in getattr(model, "peft_config", {}).values():
        raise ValueError(f"The adapter '{adapter}' is steered by its DriftConfig already: change the settings there.")


def _refuse_unready(model: nn.Module, adapter: str, low_cpu_mem_usage: bool) -> None:
    """Refuse a model that is wrapped already, or whose weights are not there yet."""
    if isinstance(model, PeftModel) or any(adapter in m.r for m in model.modules() if isinstance(m, LoraLayer)):
        raise ValueError(
            "The model is wrapped already and has an adapter: give it a second one with model.add_adapter(name, "
            "config), or take the first one off with model.unload()."
        )
    if not low_cpu_mem_usage:
        _refuse_meta(model)


def _refuse_meta(model: nn.Module) -> None:
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            "The model is on the meta device, without weights: load them first, so that the prior can be compared with "
            "them and the adapter can start from it."
        )


def _forget(modules: Iterable[nn.Module], adapter: str) -> None:
    """Whatever steered an adapter of this name does not steer the next one."""
    for module in modules:
        for steered in [s for s in getattr(module, "drift", {}).values() if s.adapter == adapter]:
            steered.release()


def _open_prior(config: DriftConfig) -> ReasoningPrior:
    try:
        prior = ReasoningPrior.load(config.prior)
    except FileNotFoundError as error:
        if config.prior_sha256 is None:
            raise
        raise FileNotFoundError(
            f"The prior '{config.prior}' that this adapter was trained with is not here: name it with "
            "DriftConfig.from_pretrained(folder, prior=…)."
        ) from error
    if config.prior_sha256 not in (None, prior.sha256):
        raise ValueError(
            f"The prior '{config.prior}' has changed since this adapter was trained (SHA-256 {prior.sha256[:12]}…, was "
            f"{config.prior_sha256[:12]}…): pass the old file, or accept this one with "
            "DriftConfig.from_pretrained(folder, prior=…)."
        )
    config.prior_sha256 = prior.sha256
    config.expert = " and ".join(dict.fromkeys(_experts(prior.metadata))) or None
    return prior


def _experts(header: dict) -> list[str]:
    """The ids of the experts that a prior, or what it was combined from, was made from."""
    if header.get("expert"):
        return [header["expert"]["id"]]
    return [expert for parent in header.get("parents", ()) for expert in _experts(parent)]


def _rank(config: DriftConfig, module_name: str) -> int:
    """The rank that PEFT will give this module's adapter."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module_name), config.r)


def _tensors(config: DriftConfig, names: Iterable[str]) -> list[str]:
    """Those of the canonical names that will be trained themselves: biases and `modules_to_save`."""
    saved = [rf"(?:.*\.)?{module}(?:\..*)?" for module in config.modules_to_save or ()]
    return [
        name
        for name in names
        if (module_kind(name) == "bias" and config.bias != "none")
        or any(re.fullmatch(pattern, name.removesuffix(".weight")) for pattern in saved)
    ]


def _steer(
    layers: list[tuple[str, LoraLayer, str]],
    trained: list[tuple[str, nn.Module, str, Tensor | None]],
    prior: ReasoningPrior | None,
    config: DriftConfig,
    adapter_name: str,
) -> list[SteeredAdapter]:
    """Register everything that the settings guide; without a prior, everything is held at the base. Returns the
    adapters."""

    def guided(name: str) -> bool:
        return (prior is None or name in prior) and is_guided(config, name)

    adapters = [
        SteeredAdapter(layer, adapter, name, config, None if prior is None else prior[name])
        for name, layer, adapter in layers
        if guided(name)
    ]
    keeps_start = config.drift_target != "delta"
    tensors, seen = [], set()
    for name, module, attribute, start in trained:
        parameter = getattr(module, attribute)
        if guided(name) and id(parameter) not in seen:  # of tied weights, the first one's Δ
            seen.add(id(parameter))
            if keeps_start and start is None:  # after an earlier call it is no longer what the tensor holds
                earlier = getattr(module, "drift", {}).get(attribute)
                held = {} if earlier is None else earlier.prior
                start = held.get("W0", values([parameter])[0].clone())
            weight = None if prior is None else prior[name]
            W0 = values([start])[0] if keeps_start else None
            tensors.append(SteeredTensor(module, adapter_name, attribute, name, config, weight, W0))
    lower = [s.name for s in adapters if config.drift_rank and s.prior and len(s.prior["S"]) < config.drift_rank]
    if lower:
        warnings.warn(
            f"drift_rank={config.drift_rank} is more than the prior holds for {len(lower)} weights, such as "
            f"{lower[0]}: these are steered by all that it holds.",
            stacklevel=3,
        )
    for s in [*adapters, *tensors]:
        s.register()
    register_callback()
    return adapters


@torch.no_grad()
def _start(steered: list[SteeredAdapter], prior: ReasoningPrior) -> None:
    """The `drift` start: A = c·V_rᵀ, B = 0. The model's function is unchanged, and D_B = s·c·U_r diag(S_r) at once.

    c is the row norm of PEFT's own start. Rows beyond the prior's rank keep that start.
    """
    short = 0
    for s in steered:
        A, B = s.parameter("A"), s.parameter("B")
        if A.device.type != "meta":  # low_cpu_mem_usage: the weights are loaded afterwards
            weight = prior[s.name]
            Vh = weight.U.mT if s.adapter in s.module.lora_embedding_A else weight.Vh
            rows = min(len(A), len(Vh))
            A[:rows] = (guidance.START_NORM * Vh[:rows].float()).to(A)
            B[:, :rows] = 0
            short += rows < len(A)
    if short:
        warnings.warn(
            f"On {short} layers the prior's rank is below the adapter's: their remaining rows of lora_A start as "
            "PEFT's do.",
            stacklevel=2,
        )


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes 4-bit layers on a CPU trainable after an evaluation pass.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight in its first forward pass in eval mode, for a kernel
    without a gradient: from then on, training raises an error, or goes on with wrong gradients where the layer has no
    bias. This switches that kernel off for the model's layers and unpacks what was packed before.
    """
    bnb = sys.modules.get("bitsandbytes")  # not imported: then the model has no layer of it
    if bnb is None:
        return
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and m.support_avx512bf16_for_cpu]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # where bitsandbytes unpacks the weight, in place
        layer.support_avx512bf16_for_cpu = False
    if any(layer.weight.device.type == "cpu" for layer in layers):
        warnings.warn(
            f"Switched off bitsandbytes' AVX512-BF16 inference kernel on {len(layers)} 4-bit layers: it has no "
            "gradient, and an evaluation pass would have made training wrong. Evaluation on this CPU is slower.",
            stacklevel=2,
        )
