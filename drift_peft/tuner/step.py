"""When the guidance runs: once per optimizer step, on what that optimizer trains.

One process-wide hook of torch.optim acts before every `step()`: there the gradient is accumulated over micro-batches
and synchronized between processes, and no training loop has to know of it. The `decoupled` scale acts in a second hook,
after it. Where DeepSpeed's engine trains copies of the parameters, the same happens around the engine's own step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..keeping import enclosing_steps, once_gradients_are_there, trained_by  # whose hook then acts before this one
from . import deepspeed
from .batches import TORCH, bias_gradients, pull_parameters
from .plan import Plan
from .sharding import Storage
from .steered import STEERED

# What an optimizer, or DeepSpeed's engine, guides; see plan.py.
_PLANS: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()


def _plan(optimizer: Any, groups: dict[int, dict], storage: Storage = TORCH) -> Plan:
    """What is guided of these parameters, as it was found before if that still holds."""
    plan = _PLANS.get(optimizer)
    if plan is None or not plan.holds(groups.keys()):
        plan = _PLANS[optimizer] = Plan(groups, storage)
    return plan


def _refuse_unreached() -> None:
    if deepspeed.reaches() or not deepspeed.imported():
        return
    if any(s.present and deepspeed.trains(s.parameter(s.factors[0])) for s in STEERED.all()):
        raise RuntimeError(
            "DeepSpeed ZeRO trains copies of the parameters, and guidance does not reach them in this version of "
            "DeepSpeed: use 0.19, or train with DDP."
        )


def _guide(plan: Plan, groups: dict[int, dict], all_groups: list[dict], loss_scale: Tensor | float | None) -> None:
    if plan.groups and any(group.get("maximize") for group in groups.values()):
        raise RuntimeError("An optimizer with maximize=True moves against the guidance: negate the loss instead.")
    # Guided steps are counted in the optimizer's state too: a checkpoint brings them back to a config that starts at 0,
    # or at 1 (distributed checkpoints take a step with zero gradients first), and with them the place in warm-up.
    for config, adapter in plan.counted:
        restored = all_groups[0].get(f"drift_steps.{adapter}", 0)
        if isinstance(config.drift_steps, int) and config.drift_steps < restored:  # a tensor after loss scaling
            config.drift_steps = restored
    for config, parts in plan.parts:
        parts = parts | {id(all_groups)}  # the optimizer itself
        if config.stepped and config.stepped.isdisjoint(parts):  # another optimizer's share of the same iteration
            config.stepped |= parts
        else:
            config.stepped, config.iteration = parts, config.drift_steps
    bias_gradients(plan.groups, loss_scale)


def _finish(plan: Plan, groups: dict[int, dict], all_groups: list[dict], applied: Tensor | int) -> None:
    """After the step: `applied` is 0 where it was skipped."""
    plan.end_step()
    pull_parameters(plan.groups, {p: group.get("lr") for p, group in groups.items()}, applied)
    for config, parts in plan.parts:
        if config.stepped == parts | {id(all_groups)}:  # the first optimizer of an iteration counts it
            config.drift_steps = config.drift_steps + applied
    for config, adapter in plan.counted:
        for group in all_groups:
            group[f"drift_steps.{adapter}"] = config.drift_steps


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not STEERED:
        return None
    enclosing = enclosing_steps()
    # A fused optimizer unscales within its kernel: its gradients still carry the GradScaler's factor here.
    loss_scale = getattr(optimizer, "grad_scale", None)

    def guide() -> None:
        _refuse_unreached()
        groups = trained_by(optimizer, enclosing)
        if groups:  # none are left to a step within a step
            _guide(_plan(optimizer, groups), groups, optimizer.param_groups, loss_scale)

    return once_gradients_are_there(guide, args, kwargs)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not STEERED:
        return
    groups = trained_by(optimizer, enclosing_steps())
    if not groups:
        return
    plan = _PLANS.get(optimizer)
    if plan is None or not plan.serves(groups.keys()):  # the step itself has changed what has a gradient
        plan = _plan(optimizer, groups)
    found_inf = getattr(optimizer, "found_inf", None)  # a tensor: reading it here would wait for the device
    _finish(plan, groups, optimizer.param_groups, 1 if found_inf is None else 1 - found_inf)


def _engine_step(engine: Any, step: Callable[[], Any]) -> Any:
    """The step of DeepSpeed's engine, with guidance around it."""
    storage = deepspeed.storage_of(engine) if STEERED else None
    if storage is None:
        return step()
    groups, all_groups = deepspeed.groups_of(engine), engine.optimizer.param_groups
    plan = _plan(engine, groups, storage)
    _guide(plan, groups, all_groups, deepspeed.loss_scale_of(engine))
    result = step()
    _finish(plan, groups, all_groups, int(engine.was_step_applied()))
    return result


for _handle in globals().get("_HANDLES", ()):  # reloading the module must not guide twice
    _handle.remove()
_HANDLES = (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))
deepspeed.install(_engine_step)
