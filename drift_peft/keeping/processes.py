"""Several processes that train one model: their places, means over them, and where not all of them take part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

BUCKET = 2**24  # elements that processes average at a time


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """In place, over the processes, of which each one holds tensors of the same shapes."""
    alike: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in alike.values():
        ends = torch.tensor([t.numel() for t in members]).cumsum(0) // BUCKET
        for _, bucket in itertools.groupby(zip(ends.tolist(), members, strict=True), key=lambda pair: pair[0]):
            parts = [tensor for _, tensor in bucket]
            flat = torch.cat([part.flatten() for part in parts])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))


def refuse_uneven(what: str) -> None:
    """RuntimeError in a forward pass under DDP's join(): a process that is out of data takes part in DDP's own sums
    alone, and `what`, which has others to take, would wait for it for ever."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or not wrapper._join_config.enable or wrapper._join_config.throw_on_early_termination:
        return
    if place()[1] == 1:  # there is no other to wait for
        return
    raise RuntimeError(
        f"{what} is not available under DDP's join(), since it needs every process at every step: give all of them "
        "the same number of batches, as DistributedSampler does, or end with the first that has none left, by "
        "join(throw_on_early_termination=True)."
    )
