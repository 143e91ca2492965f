"""DeepSpeed: its engine keeps gradients and fp32 weights of its own, so guidance runs around the engine's step.

`DeepSpeedEngine._take_model_step` is what applies an update, once per optimizer step: the gradient is accumulated and
reduced there, and neither clipped nor unscaled. It is wrapped as soon as DeepSpeed is imported, before or after this
library, so no training loop has to know of it. What the engine trains with a plain torch optimizer (fp32 without ZeRO)
is left to the hooks of torch.optim.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .sharding import Storage, shape

ENGINE = "deepspeed.runtime.engine"
Part = Callable[[Tensor], Tensor | None]  # of what a parameter has, this process's

# Installation


def install(guided_step: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Have every engine call `guided_step(engine, step)` in place of its own `step()`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _WhenImported.__name__]
    if ENGINE in sys.modules:
        _wrap(sys.modules[ENGINE].DeepSpeedEngine, guided_step)
    else:
        sys.meta_path.insert(0, _WhenImported(guided_step))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Wraps the engine once somebody imports DeepSpeed; importing it for everybody would take seconds."""

    def __init__(self, guided_step: Callable[[Any, Callable[[], Any]], Any]):
        self.guided_step = guided_step

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == ENGINE else None
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                _wrap(module.DeepSpeedEngine, self.guided_step)

            spec.loader.exec_module = exec_module
        return spec


def _wrap(engine: type, guided_step: Callable[[Any, Callable[[], Any]], Any]) -> None:
    step = getattr(engine, "_take_model_step", None)
    if step is None:  # another version of DeepSpeed; see `reaches`
        return
    step = getattr(step, "__wrapped__", step)  # reloading must not guide twice

    @functools.wraps(step)
    def take_model_step(self, *args, **kwargs):
        return guided_step(self, lambda: step(self, *args, **kwargs))

    engine._take_model_step = take_model_step


def imported() -> bool:
    """Is there an engine of DeepSpeed in this process?"""
    return ENGINE in sys.modules


def reaches() -> bool:
    """Does guidance reach what DeepSpeed's engine trains?"""
    engine = getattr(sys.modules.get(ENGINE), "DeepSpeedEngine", None)
    return hasattr(getattr(engine, "_take_model_step", None), "__wrapped__")


# What an engine trains


def trains(parameter: Tensor) -> bool:
    """Is this a parameter of ZeRO, whose gradients and fp32 weights the engine keeps elsewhere?"""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def storage_of(engine: Any) -> Storage | None:
    """Where the engine keeps what it trains; None where that is left to the hooks of torch.optim."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    if getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None:
        raise RuntimeError(
            "Guidance does not reach the gradients that DeepSpeed's torch_autocast scales in fp16: use bfloat16 there, "
            "or DeepSpeed's own fp16."
        )
    if getattr(engine.optimizer, "round_robin_gradients", False):
        raise RuntimeError(
            "Under zero_optimization.round_robin_gradients DeepSpeed does not say which part of a gradient a process "
            "has: set it to false."
        )
    return ZeroStorage() if engine.zero_optimization() else Bit16Storage()


def groups_of(engine: Any) -> dict[int, dict]:
    """id(parameter) -> its group, of everything that the engine's step updates."""
    optimizer = engine.optimizer
    names = "bit16_groups", "bf16_groups", "fp16_groups"  # ZeRO 1 and 2; with fp32 accumulation; ZeRO 3, or no ZeRO
    kept = next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), None)
    if kept is None:
        raise RuntimeError(
            f"DeepSpeed trains with {type(optimizer).__name__}, which guidance does not reach: use ZeRO 1, 2 or 3, or "
            "DDP."
        )
    group_of = getattr(optimizer, "sub_group_to_group_id", range(len(kept)))  # ZeRO 3 splits groups
    return {
        id(p): optimizer.param_groups[group_of[i]]
        for i, group in enumerate(kept)
        for p in group
        if trains(p) or p.grad is not None
    }


def loss_scale_of(engine: Any) -> float:
    """The factor that fp16 training has left in the gradients."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


class Bit16Storage(Storage):
    """fp16 or bf16 without ZeRO: the optimizer takes its gradients from `grad`, and updates flat fp32 copies."""

    def weights(self, parameters: Sequence[Tensor]) -> Tensor:
        raise RuntimeError(
            "drift_scale='decoupled' does not reach the fp32 weights that DeepSpeed keeps in 16-bit training without "
            "ZeRO: set zero_optimization.stage to 1, 2 or 3, or use another drift_scale."
        )


class ZeroStorage(Storage):
    """ZeRO 1 to 3: each process has some elements of each parameter's gradient and fp32 weights.

    To read them, each process fills in what it has, and one sum over the processes makes all layers of a shape whole.
    """

    def weights(self, parameters: Sequence[Tensor]) -> Tensor:
        return _whole(parameters, utils().safe_get_local_fp32_param, lambda p: p._hp_mapping.get_hp_fragment())

    def set_weights(self, parameters: Sequence[Tensor], stack: Tensor) -> None:
        for p, value in zip(parameters, stack, strict=True):
            if hasattr(p, "ds_id"):
                utils().safe_set_local_fp32_param(p, _padded(p, value))
                p.ds_tensor.data.copy_(_padded(p, value))  # from which the forward pass gathers
            else:
                p.set_full_hp_param(value)
            if p.shape == value.shape:  # what the forward pass uses, where it is there in full
                p.data.copy_(value)

    def gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        if getattr(parameters[0], "_hp_grad", None) is not None:  # bf16 accumulated in fp32: there in full
            return torch.stack([p._hp_grad.view(p.shape) for p in parameters])

        def fragment(p: Tensor) -> Tensor | None:
            return p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)

        return _whole(parameters, utils().safe_get_local_grad, fragment)

    def set_gradients(self, parameters: Sequence[Tensor], stack: Tensor) -> None:
        for p, value in zip(parameters, stack, strict=True):
            if hasattr(p, "ds_id"):
                utils().safe_set_local_grad(p, _padded(p, value))
            elif getattr(p, "_hp_grad", None) is not None:
                p._hp_grad.copy_(value.view_as(p._hp_grad))
            else:
                p.set_full_hp_grad(value)


def utils():
    return sys.modules["deepspeed.utils"]


def _whole(parameters: Sequence[Tensor], local: Part, fragment: Part) -> Tensor:
    """[L, *shape] in fp32 of L parameters of one shape, of each of which this process has a part: `local` under ZeRO 3,
    else `fragment`."""
    first = parameters[0]
    size, zero3 = shape(first), hasattr(first, "ds_id")
    flat = torch.zeros(len(parameters), size.numel(), device=first.device, dtype=torch.float32)
    for row, p in zip(flat, parameters, strict=True):
        if zero3:
            start, part = _start(p), local(p)
        elif p._hp_mapping is not None:
            start, part = p._hp_mapping.lp_fragment_address.start, fragment(p)
        else:
            continue
        if part is not None:
            here = row[start : start + part.numel()]
            here.copy_(part.flatten()[: here.numel()])  # ZeRO 3 pads the last fragment
    torch.distributed.all_reduce(flat, group=first.ds_process_group if zero3 else first._dp_group)
    return flat.view(len(parameters), *size)


def _start(p: Tensor) -> int:
    """ZeRO 3 cuts a flat parameter into one part per process, the last one padded."""
    processes = torch.distributed.get_world_size(p.ds_process_group)
    if p.ds_tensor.numel() != -(-p.ds_numel // processes):
        raise RuntimeError(
            "DeepSpeed keeps this model's parameters partitioned in a way that guidance does not know (MiCS, or NVMe "
            "offload): use ZeRO 3 with parameters on the GPU or CPU."
        )
    return torch.distributed.get_rank(p.ds_process_group) * p.ds_tensor.numel()


def _padded(p: Tensor, value: Tensor) -> Tensor:
    """This process's part of a whole value."""
    start, count = _start(p), p.ds_tensor.numel()
    part = value.flatten()[start : start + count]
    return functional.pad(part, (0, count - part.numel()))
