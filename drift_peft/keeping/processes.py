"""Several processes that train one model: their places, and means over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

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
