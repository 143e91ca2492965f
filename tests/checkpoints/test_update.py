"""update.py: blocks of rows put together are the whole tensor in float64, wherever the blocks end."""

import pytest
import torch

from drift_peft.checkpoints import update as module
from drift_peft.checkpoints.update import LowRank, Rows, Update, Whole, block_rows

generator = torch.Generator().manual_seed(0)
W, start, whole, A, B, m, values = (
    torch.randn(size, generator=generator) for size in ((7, 4), (7, 4), (7, 4), (2, 4), (7, 2), (7,), (4, 4))
)
rows = torch.tensor([4, 2, 0, 6])  # in any order, and among them the first and the last of a block
summed = W.double() + 1.5 * B.double() @ A.double()
there = torch.zeros(7, 4).index_copy(0, rows, torch.ones(4, 4)).bool()
# update, W', and the shape that it adapts
CASES = {
    "none": (Update("q"), W.double(), None),
    "low rank": (LowRank("q", A, B, 1.5), summed, (7, 4)),
    "dora": (LowRank("q", A, B, 1.5, m), summed * (m.double() / summed.norm(dim=1))[:, None], (7, 4)),
    "start": (LowRank("q", A, B, 1.5, start=start), summed - W.double() + start.double(), (7, 4)),
    "whole": (Whole("q", whole), whole.double(), (7, 4)),
    "added": (Whole("q", whole, added=True), W.double() + whole.double(), (7, 4)),
    "rows": (Rows("q", rows, values), torch.zeros(7, 4).index_copy(0, rows, values).double().where(there, W), (7, 4)),
}


@pytest.mark.parametrize("size", [1, 8, 12, 28])  # elements of a block: 1, 2, 3 and all rows of W
@pytest.mark.parametrize("case", CASES)
def test_blocks_make_the_tensor(case, size, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", size)
    update, expected, _ = CASES[case]
    before, rows = W.clone(), max(1, size // 4)
    blocks = list(update.blocks(W))
    assert [len(block) for block in blocks] == [min(rows, 7 - start) for start in range(0, 7, rows)]
    torch.testing.assert_close(torch.cat(blocks).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(W, before)


@pytest.mark.parametrize("case", CASES)
def test_stored_in_bf16_computed_in_fp32(case):
    update, _, _ = CASES[case]
    changed = {key: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
               for key, v in vars(update).items()}  # fmt: skip
    exact = {key: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
             for key, v in changed.items()}  # fmt: skip
    (found,), (expected,) = (type(update)(**kept).blocks(W.bfloat16().to(dtype)) for kept, dtype in
                             ((changed, torch.bfloat16), (exact, torch.float32)))  # fmt: skip
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_shape_that_does_not_fit_is_said(case):
    update, _, fitting = CASES[case]
    assert update.misfit((7, 4)) is None
    if fitting:
        assert update.misfit((7, 5)) == fitting
        assert update.misfit((6, 4)) == fitting


def test_rows_of_a_smaller_or_a_larger_vocabulary():
    update = CASES["rows"][0]
    assert update.misfit((9, 4)) is None and update.misfit((9, 5)) == (9, 4) and update.misfit((1, 4)) == (7, 4)
    none = Rows("q", torch.tensor([], dtype=torch.long), values[:0])  # trainable_token_indices={"embed_tokens": []}
    assert none.misfit((7, 4)) is None and none.misfit((7, 5)) == (7, 4)
    assert torch.equal(torch.cat([*none.blocks(W)]), W)


def test_rows_of_a_block(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 12)
    assert [block_rows(torch.empty(size)) for size in ((5, 4), (5, 2, 3), (5,), (5, 100), (0, 4), (5, 0))] == [
        3, 2, 12, 1, 12, 12,
    ]  # fmt: skip
