"""Parameters and their gradients as whole stacks, wherever their parts live.

Guidance needs whole factors: a direction for lora_A depends on all of lora_B. Under FSDP2 (`fully_shard`) a parameter
is a DTensor of which each process holds some rows; here it is gathered, all layers of a shape in one collective, and
what comes back is cut to this process's rows. Plain tensors are only stacked. Under DeepSpeed ZeRO see deepspeed.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def shape(parameter: Tensor) -> torch.Size:
    """The whole shape. ZeRO 3 leaves an empty tensor in a parameter's place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def layout(tensor: Tensor) -> Hashable:
    """What tensors must have in common to be gathered as one stack."""
    where = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
    return tensor.device, tensor.dtype, shape(tensor), where


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or parameter.shape != shape(parameter)


@contextlib.contextmanager
def whole(parameters: Sequence[Tensor]):
    """Within it, parameters that ZeRO 3 has partitioned are there in full, to be read. All processes have to enter."""
    partitioned = [p for p in parameters if p.shape != shape(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def values(parameters: Sequence[Tensor]) -> Tensor:
    """[L, *shape] of L parameters of one layout, as the forward pass sees them. A single plain one is not copied."""
    if not hasattr(parameters[0], "ds_id"):  # of DeepSpeed ZeRO 3
        return gather(parameters)
    with whole(parameters):
        return gather(parameters).clone()


class Storage:
    """Where torch's own optimizers find what they train: in the parameters, and in their `grad`."""

    def weights(self, parameters: Sequence[Tensor]) -> Tensor:
        """[L, *shape] of L parameters of one layout, as the optimizer updates them."""
        return gather(parameters)

    def set_weights(self, parameters: Sequence[Tensor], stack: Tensor) -> None:
        scatter(stack, parameters)

    def gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """[L, *shape] of what the optimizer takes for the gradients."""
        return gather([p.grad for p in parameters])

    def set_gradients(self, parameters: Sequence[Tensor], stack: Tensor) -> None:
        scatter(stack, [p.grad for p in parameters])


@torch.no_grad()
def gather(tensors: Sequence[Tensor]) -> Tensor:
    """[L, *shape] of L tensors of one layout. A single plain tensor is not copied."""
    first = tensors[0].detach()
    if not isinstance(first, DTensor):
        return first[None] if len(tensors) == 1 else torch.stack(tuple(tensors))
    local = torch.stack([t.detach().to_local() for t in tensors])
    shape = torch.Size((len(tensors), *first.shape))
    stride = torch.empty(shape, device="meta").stride()
    stacked = DTensor.from_local(
        local, first.device_mesh, _placements(first), run_check=False, shape=shape, stride=stride
    )
    return stacked.full_tensor()


@torch.no_grad()
def scatter(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write [L, *shape] into the L tensors: each process its own part."""
    first = tensors[0].detach()
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        replicated = DTensor.from_local(stack, mesh, [Replicate()] * mesh.ndim, run_check=False)
        stack = replicated.redistribute(placements=_placements(first)).to_local()
        tensors = [t.detach().to_local() for t in tensors]
    elif len(tensors) == 1 and stack.data_ptr() == first.data_ptr():
        return  # written in place already
    torch._foreach_copy_(tuple(tensors), stack.unbind())


def _placements(tensor: DTensor) -> list:
    """Those of the stack: its first dimension counts the layers."""
    return [Shard(p.dim + 1) if p.is_shard() else p for p in tensor.placements]
