"""Around every optimizer step: first what keeps acts, then what guides, whichever was set up first.

One process-wide hook of torch.optim acts before every `step()`: there the gradient is accumulated over micro-batches
and synchronized between processes, and no training loop has to know of it. A second hook acts after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

ORDER = ("keep", "guide")  # so that the bias's norms and cosines see the whole gradient
WRAPPER = torch.optim.Optimizer.profile_hook_step(len).__code__  # of torch's wrapper of every `step()`
# torch.distributed.checkpoint's function that takes a step of zeros, so that an optimizer has a state to fill or save
NO_STEP = "_init_optim_state"


@dataclass(frozen=True)
class Act:
    """What acts around a step.

    Attributes:
        wanted: takes an optimizer: whether there is anything to do at its step.
        before: takes the optimizer, id(parameter) -> its group for whatever the step will move by a gradient, and the
            factor that a GradScaler has left in the gradients, or None.
        after: takes the optimizer, the same groups, and what is 0 where the update was skipped, else 1. It is None
            where there was no step, but a state is to be filled: then what is counted in the groups is put there.
    """

    wanted: Callable[[torch.optim.Optimizer], bool]
    before: Callable[[torch.optim.Optimizer, dict[int, dict], Tensor | None], None]
    after: Callable[[torch.optim.Optimizer, dict[int, dict], Tensor | int | None], None]


class LeftGradient:
    """A gradient as a step left it: a second step on it finds there what the first one has added.

    What is written through `.data` raises no version. So some entries are remembered too; they are compared, which
    waits for the device, where all else is the same.
    """

    def __init__(self, gradient: Tensor):
        self._gradient, self._version, self._entries = TensorWeakRef(gradient), gradient._version, _entries(gradient)

    def is_still(self, gradient: Tensor | None) -> bool:
        if gradient is None or self._gradient() is not gradient or self._version != gradient._version:
            return False
        return torch.equal(self._entries, _entries(gradient).to(self._entries))  # cast and moved it is still the same


def _entries(gradient: Tensor) -> Tensor:
    """A few, from all over it; none of what is sharded, of which each process has others, or sparse."""
    plain = gradient.layout is torch.strided and not isinstance(gradient, DTensor)
    flat = gradient.detach().reshape(-1) if plain else torch.empty(0)
    return flat[:: max(1, len(flat) // 64)].clone()


_ACTS: dict[str, Act] = globals().get("_ACTS", {})  # reloading this module keeps what acts


def act_in_steps(name: str, act: Act) -> None:
    """Have it act around every step from now on, in its place of `ORDER`."""
    _ACTS[name] = act


def _wanted(optimizer: torch.optim.Optimizer) -> list[Act]:
    return [_ACTS[name] for name in ORDER if name in _ACTS and _ACTS[name].wanted(optimizer)]


def _trained_by(optimizer: torch.optim.Optimizer, enclosing: list[torch.optim.Optimizer]) -> dict[int, dict]:
    """id(parameter) -> its group, for the parameters with a gradient. Those of an enclosing step are left to it.

    What is frozen by now is moved by its gradient all the same, such as an adapter that was the active one in its
    backward pass alone; but of an adapter that took no part, gradients of zeros may be left.
    """
    groups = {
        id(p): group
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and (p.requires_grad or _moves(p.grad))
    }
    for outer in enclosing:
        for group in outer.param_groups:
            for p in group["params"]:
                groups.pop(id(p), None)
    return groups


def _moves(gradient: Tensor) -> bool:
    """Is any of it not 0, on any process? This waits for the device."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    total = torch.linalg.vector_norm(gradient.detach(), 1)  # unlike squares, no small number becomes 0
    return bool(total.full_tensor() if isinstance(total, DTensor) else total)


def _enclosing_steps() -> list[torch.optim.Optimizer] | None:
    """The optimizers in whose `step()` the step was called that the hook acts for; None if it is not for training.

    Optimizers that call `super().step()` or wrap another optimizer fire the hook again in the middle of one step. The
    call stack says so without a flag that an exception within a step would leave behind.
    """
    frame, optimizers = sys._getframe(), []
    while frame is not None:
        code = frame.f_code
        if code is WRAPPER:
            optimizers.append(frame.f_locals["args"][0])
        elif code.co_name == NO_STEP:
            return None
        frame = frame.f_back
    return optimizers[1:]


# A compiled `step()` would trace all that acts into graphs of its own, in a minute and more: it is called instead.
@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    acts = _wanted(optimizer)
    if not acts:
        return None
    enclosing = _enclosing_steps()
    if enclosing is None:
        return None
    # A fused optimizer unscales within its kernel: its gradients still carry the GradScaler's factor here.
    loss_scale = getattr(optimizer, "grad_scale", None)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")

    def act() -> None:
        groups = _trained_by(optimizer, enclosing)  # none are left to a step within a step
        for each in acts:
            each.before(optimizer, groups, loss_scale)

    if not callable(closure):  # none, or another argument of this optimizer's own
        act()
        return None

    def acting_closure() -> Any:  # the gradients of this step come into being only when the optimizer calls it
        loss = closure()
        act()
        return loss

    if len(args) > 1:
        return (args[0], acting_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": acting_closure}


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    acts = _wanted(optimizer)
    if not acts:
        return
    enclosing = _enclosing_steps()
    groups = _trained_by(optimizer, enclosing or [])
    if not groups:
        return
    found_inf = getattr(optimizer, "found_inf", None)  # a tensor: reading it here would wait for the device
    applied = None if enclosing is None else 1 if found_inf is None else 1 - found_inf
    for each in acts:
        each.after(optimizer, groups, applied)


for _handle in globals().get("_HANDLES", ()):  # reloading the module must not act twice
    _handle.remove()
_HANDLES = (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))
