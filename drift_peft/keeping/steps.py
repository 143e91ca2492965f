"""What every hook of torch.optim has to know: which parameters a step trains, and when their gradients are complete."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


def trained_by(optimizer: torch.optim.Optimizer, enclosing: list[torch.optim.Optimizer]) -> dict[int, dict]:
    """id(parameter) -> its group, for the parameters with a gradient. Those of an enclosing step are left to it."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for outer in enclosing:
        for group in outer.param_groups:
            for p in group["params"]:
                groups.pop(id(p), None)
    return groups


def enclosing_steps() -> list[torch.optim.Optimizer]:
    """The optimizers in whose `step()` the hook's caller, torch's wrapper of `step()`, was called. To be called by the
    hook itself.

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


def once_gradients_are_there(act: Callable[[], None], args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Act now, or where the optimizer is given a closure, after that has made the gradients of this step.

    Returns:
        What a hook before the step returns: other arguments of `step()`, or None.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        act()
        return None

    def acting_closure():
        loss = closure()
        act()
        return loss

    if len(args) > 1:
        return (args[0], acting_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": acting_closure}
