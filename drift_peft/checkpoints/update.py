"""What an adapter makes of one tensor of its base, a block of rows at a time and in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 17  # elements that are computed at once: they fit the cache, and their memory is used again


def block_rows(W: Tensor) -> int:
    """How many rows of W [rows, ...] a block has, so that memory stays small whatever the tensor's size."""
    return max(1, BLOCK // max(1, torch.atleast_1d(W)[:1].numel()))


def is_finite(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())  # some of one byte lack it


@dataclass(frozen=True)
class Update:
    """What replaces a tensor W [rows, ...] of the base: by itself, W. `module` is what the adapter calls its module."""

    module: str

    def blocks(self, W: Tensor) -> Iterator[Tensor]:
        """W' in fp32, as consecutive blocks of rows. A single number is one row."""
        W = torch.atleast_1d(W)
        rows = block_rows(W)
        for start in range(0, len(W), rows):
            yield self.block(W, slice(start, start + rows))

    def block(self, W: Tensor, rows: slice) -> Tensor:
        return W[rows].float()

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape that W would need, if it is not the one that it has."""
        return None


@dataclass(frozen=True)
class LowRank(Update):
    """W + s·B·A with A [r, in] and B [out, r] as stored, memory-mapped.

    With DoRA's `magnitude` m [out], each row of the sum is scaled to that norm (arXiv 2402.09353, equation 5). `start`
    [out, in] stands in place of W where the adapter has brought the layer's own weight along.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    start: Tensor | None = None

    def block(self, W: Tensor, rows: slice) -> Tensor:
        W = W if self.start is None else self.start
        moved = torch.addmm(W[rows].float(), self.B[rows].float(), self.A.float(), alpha=self.scaling)
        if self.magnitude is None:
            return moved
        return moved * (self.magnitude[rows].float() / torch.linalg.vector_norm(moved, dim=1))[:, None]

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        expected = len(self.B), self.A.shape[1]
        return None if shape == expected else expected


@dataclass(frozen=True)
class Whole(Update):
    """The tensor as it was trained itself (`modules_to_save`, biases); `added` to W where it is an adapter's bias."""

    value: Tensor
    added: bool = False

    def block(self, W: Tensor, rows: slice) -> Tensor:
        value = torch.atleast_1d(self.value)[rows].float()
        return W[rows].float() + value if self.added else value

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if shape == tuple(self.value.shape) else tuple(self.value.shape)


@dataclass(frozen=True)
class Rows(Update):
    """Some rows as they were trained (`trainable_token_indices`): `values` [n, in] at the indices `rows` [n]."""

    rows: Tensor
    values: Tensor

    def block(self, W: Tensor, rows: slice) -> Tensor:
        moved = W[rows].to(torch.float32, copy=True)
        here = (self.rows >= rows.start) & (self.rows < rows.start + len(moved))
        moved[self.rows[here] - rows.start] = self.values[here].float()
        return moved

    def misfit(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        expected = max([shape[0], *(self.rows + 1).tolist()]), self.values.shape[1]
        return None if shape == expected else expected
