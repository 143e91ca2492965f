"""All that the settings guide in a model is registered, and its adapters get their start."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..keeping import add_to_trainers
from ..prior import PriorVector, PriorWeight, ReasoningPrior
from ..warn import warn
from . import guidance
from .config import DriftConfig
from .settings import is_guided
from .sharding import values
from .steered import SteeredAdapter, SteeredTensor, TrainedTensor
from .trainer import DriftCallback


def refuse_meta(model: nn.Module) -> None:
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            "The model is on the meta device, without weights: load them first, so that the prior can be compared with "
            "them and the adapter can start from it."
        )


def steer(
    layers: list[tuple[str, LoraLayer, str]],
    trained: list[TrainedTensor],
    prior: ReasoningPrior | None,
    config: DriftConfig,
    adapter_name: str,
) -> list[SteeredAdapter]:
    """Register everything that the settings guide, toward what the base has not taken in of Δ; without a prior,
    everything is held at the base. Where all of Δ was merged in, nothing is left to pull to. Returns the adapters."""

    def guided(name: str) -> bool:
        return (prior is None or name in prior) and is_guided(config, name) and not config.absorbed(name)

    def left(name: str) -> PriorWeight | PriorVector | None:
        if prior is None:
            return None
        return prior[name] if config.merged is None else config.merged.left(name, prior[name])

    adapters = [
        SteeredAdapter(layer, adapter, name, config, left(name)) for name, layer, adapter in layers if guided(name)
    ]
    keeps_start = config.drift_target != "delta"
    tensors, seen = [], set()
    for name, module, attribute, start, owner in trained:
        parameter = getattr(module, attribute)
        if guided(name) and id(parameter) not in seen:  # of tied weights, the first one's Δ
            seen.add(id(parameter))
            if keeps_start and start is None:  # after an earlier call it is no longer what the tensor holds
                earlier = vars(module).get("drift_peft", {}).get(attribute)
                held = {} if earlier is None else earlier.prior
                start = held.get("W0", values([parameter])[0].clone())
            W0 = values([start])[0] if keeps_start else None
            tensors.append(SteeredTensor(module, owner or adapter_name, attribute, name, config, left(name), W0))
    lower = [s.name for s in adapters if config.drift_rank and s.prior and len(s.prior["S"]) < config.drift_rank]
    if lower:
        warn(
            f"drift_rank={config.drift_rank} is more than the prior holds for {len(lower)} weights, such as "
            f"{lower[0]}: these are steered by all that it holds."
        )
    # Whatever steered these before goes, also what the settings leave out now; but not another adapter's guidance.
    mine = {"", adapter_name, *(adapter for *_, adapter in layers)}
    for module in [*(layer for _, layer, _ in layers), *(t.module for t in trained)]:
        for earlier in [s for s in vars(module).get("drift_peft", {}).values() if s.adapter in mine]:
            earlier.release()
    for s in [*adapters, *tensors]:
        s.register()
    add_to_trainers(DriftCallback)
    return adapters


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
