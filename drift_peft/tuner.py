"""DriftModel: PEFT's LoraModel whose layers know the prior that steers them; `guide` for models wrapped elsewhere."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn

from . import guidance
from .config import DriftConfig
from .fit import check_fit
from .naming import language_model_targets
from .prior import ReasoningPrior
from .step import Steered, lora_layers

ZERO_STARTS = ("drift", True, "gaussian", "eva")  # starts with lora_B = 0


class DriftModel(LoraModel):
    """What `get_peft_model(model, DriftConfig(…))` makes. The forward pass is PEFT's own; gradients are guided.

    Plain `LoraConfig`s pass through as in LoraModel, in models of their own and beside a DriftConfig.

    Raises:
        ValueError: the prior belongs to another model, or none of the targets has a Δ. The model is then untouched.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        _forget(model, adapter_name)  # one of this name may have been deleted, past this class even
        if not isinstance(config, DriftConfig):
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.inference_mode:
            if config.target_modules is None:
                config.target_modules = language_model_targets(model)
            return super().inject_adapter(model, adapter_name, *args, **kwargs)

        # A copy: what is filled in below belongs to this model, and the user may wrap another one with the same config.
        config = self.peft_config[adapter_name] = copy.copy(config)
        prior = _open_prior(config)
        keep_4bit_differentiable(model)
        if config.target_modules is None:
            config.target_modules = language_model_targets(model, prior)
        _maybe_include_all_linear_layers(config, model)
        names = [name for name, _ in model.named_modules() if self._check_target_module_exists(config, name)]
        check_fit(model, prior, config, {name: _rank(config, name) for name in names})
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        steered = _steer(lora_layers(model, adapter_name), prior, config)
        if config.init_lora_weights == "drift":
            _start(steered, prior)

    def _create_and_replace(self, lora_config, *args, **kwargs) -> None:
        if isinstance(lora_config, DriftConfig) and lora_config.init_lora_weights == "drift":
            # PEFT's layers refuse a start that they do not know; ours comes after them.
            lora_config = copy.copy(lora_config)
            lora_config.init_lora_weights = True
        super()._create_and_replace(lora_config, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        _forget(self.model, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict, **kwargs):
        if isinstance(config, DriftConfig):
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
        expects_steps = isinstance(config, DriftConfig) and not config.inference_mode and config.drift_alpha > 0
        if expects_steps and starts_at_zero and int(config.drift_steps) == 0:
            if any(weight.any() for name, weight in weights.items() if ".lora_B." in name):
                warnings.warn(
                    f"The adapter '{adapter_name}' was trained, but the guidance never ran: its optimizer does not "
                    "call the step hooks of torch.optim, or trains copies of the parameters. It is plain LoRA.",
                    stacklevel=2,
                )
        return weights


def guide(
    model: nn.Module,
    prior: ReasoningPrior | str,
    adapter_name: str | None = None,
    *,
    drift_alpha: float = 1.0,
    drift_scale: str = "adaptive",
    drift_target: str = "residual",
    drift_rank: int | None = None,
    drift_norm: str = "factor",
) -> nn.Module:
    """Steer the LoRA adapters of a model that was wrapped elsewhere (PEFT, TRL, Unsloth, LLaMA-Factory).

    The settings are those of `DriftConfig`; the adapter's start stays as it is, and so does what it saves. Without
    `adapter_name` every active adapter is steered. Calling it again replaces the settings. Returns the model.

    Raises:
        ValueError: the model has no LoRA layers, uses a LoRA variant with another chain rule, was wrapped with
            DriftConfig, or does not fit the prior.
    """
    prior = prior if isinstance(prior, ReasoningPrior) else ReasoningPrior.load(prior)
    layers = list(lora_layers(model, adapter_name))
    if not layers:
        wanted = "LoRA layers on its language model" if adapter_name is None else f"adapter '{adapter_name}'"
        raise ValueError(f"The model has no {wanted}: wrap it with get_peft_model first.")
    for name, layer, adapter in layers:
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__
            raise ValueError(f"{name} uses {variant}, whose chain rule is not plain LoRA's: train it without guidance.")
        if drift_target == "factors" and layer.scaling[adapter] <= 0:
            raise ValueError(
                f"{name} has the LoRA scaling {layer.scaling[adapter]}, but drift_target='factors' divides by it: use "
                "drift_target='residual'."
            )
        current = getattr(layer, "drift", {}).get(adapter)
        if current is not None and current.config in getattr(model, "peft_config", {}).values():
            raise ValueError(
                f"The adapter '{adapter}' is steered by its DriftConfig already: change the settings there."
            )
    config = DriftConfig(
        prior=prior.source,
        prior_sha256=prior.sha256,
        r=max(layer.r[adapter] for _, layer, adapter in layers),
        drift_alpha=drift_alpha,
        drift_scale=drift_scale,
        drift_target=drift_target,
        drift_rank=drift_rank,
        drift_norm=drift_norm,
    )
    keep_4bit_differentiable(model)
    adapters = {adapter for _, _, adapter in layers}
    targets = {
        name: min(layer.r[a] for a in adapters.intersection(layer.lora_A))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapters.intersection(layer.lora_A)
    }
    check_fit(model, prior, config, targets)
    _steer(layers, prior, config)
    return model


def _forget(model: nn.Module, adapter: str) -> None:
    """Whatever steered an adapter of this name does not steer the next one."""
    for module in model.modules():
        getattr(module, "drift", {}).pop(adapter, None)


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
    return prior


def _rank(config: DriftConfig, module_name: str) -> int:
    """The rank that PEFT will give this module's adapter."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module_name), config.r)


def _steer(layers: Iterable[tuple[str, LoraLayer, str]], prior: ReasoningPrior, config: DriftConfig) -> list[Steered]:
    steered = [Steered(layer, adapter, name, prior[name], config) for name, layer, adapter in layers if name in prior]
    lower = [s.name for s in steered if config.drift_rank and len(s.S) < config.drift_rank]
    if lower:
        warnings.warn(
            f"drift_rank={config.drift_rank} is more than the prior holds for {len(lower)} weights, such as "
            f"{lower[0]}: these are steered by all that it holds.",
            stacklevel=3,
        )
    for s in steered:
        s.register()
    return steered


@torch.no_grad()
def _start(steered: list[Steered], prior: ReasoningPrior) -> None:
    """The `drift` start: A = c·V_rᵀ, B = 0. The model's function is unchanged, and D_B = s·c·U_r diag(S_r) at once.

    c is the row norm of PEFT's own start. Rows beyond the prior's rank keep that start.
    """
    short = 0
    for s in steered:
        if s.A.device.type != "meta":  # low_cpu_mem_usage: the weights are loaded afterwards
            Vh = prior[s.name].Vh[: len(s.A)].float()
            rows = len(Vh)
            s.A[:rows] = (guidance.START_NORM * Vh).to(s.A)
            s.B.zero_()
            short += rows < len(s.A)
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
