"""When the guidance runs: once per optimizer step, on what that optimizer trains.

One process-wide hook of torch.optim acts before every `step()`: there the gradient is accumulated over micro-batches
and synchronized between processes, and no training loop has to know of it. The `decoupled` scale acts in a second hook,
after it. Where DeepSpeed's engine trains copies of the parameters, the same happens around the engine's own step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import deepspeed
from .batches import TORCH, bias_gradients, pull_parameters
from .config import DriftConfig
from .sharding import Storage
from .steered import STEERED, Steered, SteeredAdapter


def _trained_by(
    optimizer: torch.optim.Optimizer, enclosing: list[torch.optim.Optimizer]
) -> tuple[list[Steered], dict[int, dict]]:
    """What to guide in this step, and id(parameter) -> its group for the parameters with a gradient.

    Parameters of an enclosing step are left to it.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for outer in enclosing:
        for group in outer.param_groups:
            for p in group["params"]:
                groups.pop(id(p), None)
    for s in STEERED:
        if s.present and deepspeed.trains(s.parameter(s.factors[0])) and not deepspeed.reaches():
            raise RuntimeError(
                "DeepSpeed ZeRO trains copies of the parameters, and guidance does not reach them in this version of "
                "DeepSpeed: use 0.19, or train with DDP."
            )
    return _steered(groups), groups


def _steered(parameters: Iterable[int]) -> list[Steered]:
    """What is steered of the parameters with these id()s."""
    return [s for s in STEERED if s.present and any(id(s.parameter(factor)) in parameters for factor in s.factors)]


def _enclosing_steps() -> list[torch.optim.Optimizer]:
    """The optimizers in whose `step()` the hook's caller, torch's wrapper of `step()`, was called.

    Optimizers that call `super().step()` or wrap another optimizer fire the hook again in the middle of one step. The
    call stack says so without a flag that an exception within a step would leave behind.
    """
    wrapper = sys._getframe(2)
    frame, optimizers = wrapper.f_back, []
    while frame is not None:
        if frame.f_code is wrapper.f_code:
            optimizers.append(frame.f_locals["args"][0])
        frame = frame.f_back
    return optimizers


def _by_config(
    steered: list[Steered], groups: dict[int, dict], all_groups: list[dict]
) -> list[tuple[DriftConfig, frozenset]]:
    """What one optimizer trains of each configuration: (weight, adapter, factor), and the optimizer itself."""
    found: dict[int, tuple[DriftConfig, set]] = {}
    for s in steered:
        if s.alpha:
            parts = {(s.name, s.adapter, factor) for factor in s.factors if id(s.parameter(factor)) in groups}
            found.setdefault(id(s.config), (s.config, {id(all_groups)}))[1].update(parts)
    return [(config, frozenset(parts)) for config, parts in found.values()]


def _guide(
    steered: list[Steered], groups: dict[int, dict], all_groups: list[dict], loss_scale, storage: Storage = TORCH
) -> None:
    if steered and any(group.get("maximize") for group in groups.values()):
        raise RuntimeError("An optimizer with maximize=True moves against the guidance: negate the loss instead.")
    # Guided steps are counted in the optimizer's state too: a checkpoint brings them back to a config that starts at 0,
    # or at 1 (distributed checkpoints take a step with zero gradients first), and with them the place in warm-up.
    for s in steered:
        restored = all_groups[0].get(f"drift_steps.{s.adapter}", 0)
        if isinstance(s.config.drift_steps, int) and s.config.drift_steps < restored:  # a tensor after loss scaling
            s.config.drift_steps = restored
    for config, parts in _by_config(steered, groups, all_groups):
        if config.stepped and config.stepped.isdisjoint(parts):  # another optimizer's share of the same iteration
            config.stepped |= parts
        else:
            config.stepped, config.iteration = parts, config.drift_steps
    bias_gradients(steered, groups, loss_scale, storage)


def _finish(
    steered: list[Steered], groups: dict[int, dict], all_groups: list[dict], applied, storage: Storage = TORCH
) -> None:
    """After the step: `applied` is 0 where it was skipped."""
    for s in steered:
        if isinstance(s, SteeredAdapter) and s.capture is not None:
            s.capture.stale = True
    pull_parameters(steered, {p: group.get("lr") for p, group in groups.items()}, applied, storage)
    for config, parts in _by_config(steered, groups, all_groups):
        if config.stepped == parts:  # the first optimizer of an iteration counts it
            config.drift_steps = config.drift_steps + applied
    for s in {id(s.config): s for s in steered if s.alpha}.values():
        for group in all_groups:
            group[f"drift_steps.{s.adapter}"] = s.config.drift_steps


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not STEERED:
        return None
    enclosing = _enclosing_steps()
    # A fused optimizer unscales within its kernel: its gradients still carry the GradScaler's factor here.
    loss_scale = getattr(optimizer, "grad_scale", None)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _guide(*_trained_by(optimizer, enclosing), optimizer.param_groups, loss_scale)
        return None

    def guided_closure():  # the gradients of this step come into being only when the optimizer calls it
        loss = closure()
        _guide(*_trained_by(optimizer, enclosing), optimizer.param_groups, loss_scale)
        return loss

    if len(args) > 1:
        return (args[0], guided_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": guided_closure}


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not STEERED:
        return
    steered, groups = _trained_by(optimizer, _enclosing_steps())
    found_inf = getattr(optimizer, "found_inf", None)  # a tensor: reading it here would wait for the device
    applied = 1 if found_inf is None else 1 - found_inf
    _finish(steered, groups, optimizer.param_groups, applied)


def _engine_step(engine: Any, step: Callable[[], Any]) -> Any:
    """The step of DeepSpeed's engine, with guidance around it."""
    storage = deepspeed.storage_of(engine) if STEERED else None
    if storage is None:
        return step()
    groups = deepspeed.groups_of(engine)
    steered, all_groups = _steered(groups), engine.optimizer.param_groups
    _guide(steered, groups, all_groups, deepspeed.loss_scale_of(engine), storage)
    result = step()
    _finish(steered, groups, all_groups, int(engine.was_step_applied()), storage)
    return result


for _handle in globals().get("_HANDLES", ()):  # reloading the module must not guide twice
    _handle.remove()
_HANDLES = (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))
deepspeed.install(_engine_step)
