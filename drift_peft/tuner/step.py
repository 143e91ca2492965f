"""When the guidance runs: once per optimizer step, on what that optimizer trains.

It acts around every `step()` of torch's optimizers, before the update, and the `decoupled` scale after it. Where
DeepSpeed's engine trains copies of the parameters, the same happens around the engine's own step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..keeping import Act, Known, act_in_steps, is_kept
from . import deepspeed
from .batches import TORCH, bias_gradients, pull_parameters, warn_of_rounding
from .plan import Plan
from .settings import DriftSettings
from .sharding import Storage
from .steered import STEERED
from .unguided import UNGUIDED, warn_of_unguided

# What an optimizer, or DeepSpeed's engine, guides; see plan.py.
_PLANS: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()


def _plan(optimizer: Any, groups: dict[int, dict], parameters: Sequence[Tensor], storage: Storage = TORCH) -> Plan:
    """What is guided of these groups, as it was found before if that still holds; `parameters` are all of the
    optimizer's, with a gradient or without."""
    plan = _PLANS.get(optimizer)
    if plan is None or not plan.holds(groups.keys()):
        known = plan.known if plan is not None and plan.known.are_of(parameters) else Known(STEERED, parameters)
        written = {} if plan is None else plan.written
        plan = _PLANS[optimizer] = Plan(groups, known, storage, written)
        warn_of_unguided(groups)
        if storage is TORCH:  # DeepSpeed trains copies in fp32
            warn_of_rounding(plan.groups, groups)
    return plan


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _refuse_unreached() -> None:
    if deepspeed.reaches() or not deepspeed.imported():
        return
    if any(s.present and deepspeed.trains(s.parameter(s.factors[0])) for s in STEERED.since()):
        raise RuntimeError(
            "DeepSpeed ZeRO trains copies of the parameters, and guidance does not reach them in this version of "
            "DeepSpeed: use 0.19, or train with DDP."
        )


def _guide(plan: Plan, groups: dict[int, dict], all_groups: list[dict], loss_scale: Tensor | float | None) -> None:
    if plan.groups and any(group.get("maximize") for group in groups.values()):
        raise RuntimeError("An optimizer with maximize=True moves against the guidance: negate the loss instead.")
    if any(config.drift_norm == "weight" for config, _ in plan.parts) and is_kept(groups):
        raise RuntimeError(
            "drift_norm='weight' does not see the gradient that keep() adds: use drift_norm='factor' beside it, or mix "
            "the keep set's answers into the training data (drift-peft keep samples)."
        )
    for config, parts in plan.parts:
        parts = parts | {id(all_groups)}  # the optimizer itself
        if config.stepped and config.stepped.isdisjoint(parts):  # another optimizer's share of the same iteration
            config.stepped |= parts
        else:
            for key in plan.counted[id(config)]:
                _restore(config, all_groups[0].get(key), plan.written.get(key))
            config.stepped, config.iteration = parts, config.drift_steps
    bias_gradients(plan.groups, loss_scale)


def _restore(config: DriftSettings, stored: Tensor | int | None, written: Tensor | int | None) -> None:
    """Guided steps are counted in the optimizer's state too: a checkpoint brings them back to a config, and with them
    the place in warm-up, whether training goes on in a new process or goes back in this one. What guidance has
    `written` there itself may be of an adapter that is gone."""
    if stored is not None and stored is not written and (written is None or stored != written):
        config.drift_steps = stored


def _finish(
    plan: Plan, groups: dict[int, dict], all_groups: list[dict], applied: Tensor | int, second: dict[int, Tensor]
) -> None:
    """After the step: `applied` is 0 where it was skipped; for `second` see `pull_parameters`."""
    plan.end_step()
    pull_parameters(plan.groups, {p: group.get("lr") for p, group in groups.items()}, applied, second)
    for config, parts in plan.parts:
        if config.stepped == parts | {id(all_groups)}:  # the first optimizer of an iteration counts it
            config.drift_steps = config.drift_steps + applied
    for config, _ in plan.parts:
        for key in plan.counted[id(config)]:
            plan.written[key] = config.drift_steps
            for group in all_groups:
                group[key] = config.drift_steps


def _before_step(optimizer: torch.optim.Optimizer, groups: dict[int, dict], loss_scale: Tensor | None) -> None:
    _refuse_unreached()
    if groups:
        _guide(_plan(optimizer, groups, _parameters(optimizer)), groups, optimizer.param_groups, loss_scale)


def _after_step(optimizer: torch.optim.Optimizer, groups: dict[int, dict], applied: Tensor | int | None) -> None:
    plan = _PLANS.get(optimizer)
    if plan is None or not plan.serves(groups.keys()):  # the step itself has changed what has a gradient
        plan = _plan(optimizer, groups, _parameters(optimizer))
    schedule_free = "train_mode" in optimizer.param_groups[0]
    second = {id(p): state["z"] for p, state in optimizer.state.items() if "z" in state} if schedule_free else {}
    _finish(plan, groups, optimizer.param_groups, 0 if applied is None else applied, second)


def _engine_step(engine: Any, step: Callable[[], Any]) -> Any:
    """The step of DeepSpeed's engine, with guidance around it."""
    if UNGUIDED:
        warn_of_unguided({id(p) for p in engine.module.parameters() if p.requires_grad})
    storage = deepspeed.storage_of(engine) if STEERED else None
    if storage is None:
        return step()
    groups, all_groups = deepspeed.groups_of(engine), engine.optimizer.param_groups
    plan = _plan(engine, groups, [*engine.module.parameters()], storage)
    _guide(plan, groups, all_groups, deepspeed.loss_scale_of(engine))
    result = step()
    _finish(plan, groups, all_groups, int(engine.was_step_applied()), {})
    return result


act_in_steps("guide", Act(lambda _: bool(STEERED) or bool(UNGUIDED), _before_step, _after_step))
deepspeed.install(_engine_step)
