"""The adapter's start in the directions of Δ: which adapter can have it, and what it is."""

from __future__ import annotations

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..prior import ReasoningPrior
from ..warn import warn
from . import guidance
from .sharding import is_sharded
from .steered import SteeredAdapter, lora_factor, lora_layers


@torch.no_grad()
def start_adapters(steered: list[SteeredAdapter], prior: ReasoningPrior) -> None:
    """The `drift` start: A = c·V_rᵀ and B = λ·U_r diag(S_r)/(s·c), with λ the setting `drift_start`, so that s·B·A =
    λ·Δ_r. At λ = 0 the model's function is unchanged, and D_B = s·c·U_r diag(S_r) at once.

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
            B[:, :rows] = s.starts(B)[:, :rows].to(B.device) if s.config.drift_start else 0
            short += rows < len(A)
    if short:
        warn(
            f"On {short} layers the prior's rank is below the adapter's: their remaining rows of lora_A start as "
            "PEFT's do."
        )


def is_new(model: nn.Module) -> bool:
    """Has the model LoRA adapters, and are they all as PEFT's own start makes them, each of them whole?"""
    configs = getattr(model, "peft_config", {})
    layers = [(layer, adapter) for _, layer, adapter in lora_layers(model)]
    return bool(layers) and all(
        not isinstance(layer, AdaLoraLayer)  # which has no lora_B of LoRA's
        and getattr(configs.get(adapter), "init_lora_weights", True) is True
        and not any(map(is_sharded, _factors(layer, adapter)))
        and not _is_filled(layer, adapter)
        for layer, adapter in layers
    )


def refuse_to_start(layers: list[tuple[str, LoraLayer, str]], prior: ReasoningPrior | None, share: float) -> None:
    """Only an adapter that is whole, and adds nothing to its weight yet, can be given its start.

    Args:
        share: how much of Δ, from 0 to 1.
    """
    if prior is None or not layers:
        raise ValueError(
            "init_lora_weights='drift' starts a LoRA adapter in the directions of Δ, but guide() was given no "
            f"{'prior' if prior is None else 'adapter'}: leave it out."
        )
    adapters = sorted({adapter for *_, adapter in layers})
    if share and len(adapters) > 1:
        raise ValueError(
            f"drift_start={share} would put its part of Δ into each of the adapters {', '.join(adapters)}: name one "
            "with adapter_name, or leave out drift_start."
        )
    for name, layer, adapter in layers:
        if any(map(is_sharded, _factors(layer, adapter))):
            raise ValueError(
                f"The adapter of {name} is sharded already, and init_lora_weights='drift' fills it as a whole: call "
                "guide() before the model is sharded."
            )
        if _is_filled(layer, adapter):
            raise ValueError(
                f"The adapter of {name} has been trained or merged already, or has had its start: leave out "
                f"init_lora_weights{' and drift_start' if share else ''}."
            )


def _is_filled(layer: LoraLayer, adapter: str) -> bool:
    """Is B·A anything but 0, or merged? PEFT starts lora_B at 0, and on embeddings lora_A."""
    return adapter in layer.merged_adapters or all(f.is_meta or bool(f.any()) for f in _factors(layer, adapter))


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    return lora_factor(layer, "A", adapter), lora_factor(layer, "B", adapter)
