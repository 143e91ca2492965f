"""All that the settings guide in a model is registered."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from ..keeping import add_to_trainers
from ..prior import PriorVector, PriorWeight, ReasoningPrior
from ..warn import warn
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
    _go_on_from_starts(adapters, config)
    # Whatever steered these before goes, also what the settings leave out now; but not another adapter's guidance.
    mine = {"", adapter_name, *(adapter for *_, adapter in layers)}
    for module in [*(layer for _, layer, _ in layers), *(t.module for t in trained)]:
        for earlier in [s for s in vars(module).get("drift_peft", {}).values() if s.adapter in mine]:
            config.steps_before = max(config.steps_before, int(earlier.config.drift_steps), earlier.config.steps_before)
            earlier.release()
    for s in [*adapters, *tensors]:
        s.register()
    config.in_force = True
    add_to_trainers(DriftCallback)
    return adapters


def _go_on_from_starts(adapters: list[SteeredAdapter], config: DriftConfig) -> None:
    """What `guide` gave to an adapter when it was new is its start under other settings, too."""
    if config.init_lora_weights == "drift" or config.drift_target == "base":
        return
    for s in adapters:
        earlier = vars(s.module).get("drift_peft", {}).get(s.adapter)
        if earlier is not None and earlier.config.init_lora_weights == "drift":
            s.start = earlier.start
            config.init_lora_weights, config.drift_start = "drift", earlier.config.drift_start
