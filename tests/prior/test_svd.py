"""svd.py against torch.linalg.svd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drift_peft.prior import svd
from drift_peft.prior.svd import frobenius_norm, truncated_svd


def with_spectrum(out, in_, S, seed=0):
    """A random matrix [out, in] with the singular values S."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(S), generator=generator, dtype=torch.float64)).Q for n in (out, in_))
    return ((U * S) @ V.T).float()


def powers(n, decay):
    return torch.arange(1, n + 1, dtype=torch.float64) ** -decay


def check(matrix, rank, tolerance=1e-5):
    """Orthonormal factors, the best energy to 0.5%, reported as it is true of the factors. Returns S, energy."""
    U, S, Vh, energy = truncated_svd(matrix, rank)
    squares = torch.linalg.svdvals(matrix.double()).square()
    best = float(squares[:rank].sum() / squares.sum())
    assert 0.995 * best <= energy <= best * (1 + 1e-5)
    for columns in (U, Vh.T):
        assert torch.allclose(columns.T @ columns, torch.eye(rank, dtype=matrix.dtype), atol=tolerance)
    # ‖M − USV‖² = (1 − energy)·‖M‖²
    error = (matrix - U * S @ Vh).double().square().sum() / matrix.double().square().sum()
    assert error == pytest.approx(1 - energy, abs=1e-5)
    return S, energy


@pytest.mark.parametrize("shape", [(300, 300), (200, 700), (500, 250)])
@pytest.mark.parametrize("decay", [1 / 2, 1 / 4, 1 / 10])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_captured_energy_is_close_to_optimal_on_slowly_decaying_spectra(shape, decay, rank):
    assert min(shape) > svd.EXACT_BELOW * (rank + svd.OVERSAMPLING)  # the randomized path
    check(with_spectrum(*shape, powers(min(shape), decay)), rank)


def test_captured_energy_at_rank_64_after_bf16_rounding():
    check(with_spectrum(400, 1500, powers(400, 1 / 4)).bfloat16().float(), 64)


def test_flatter_spectra_take_more_passes(monkeypatch):
    def passes(S):
        counts = []
        monkeypatch.setattr(svd, "_converged", lambda captured, total: counts.append(1) or converged(captured, total))
        truncated_svd(with_spectrum(400, 400, S), 4)
        return len(counts)

    converged = svd._converged
    low_rank, steep, flat = torch.ones(3, dtype=torch.float64), powers(400, 1 / 2), powers(400, 1 / 10)
    assert passes(low_rank) == 2 < passes(steep) < passes(flat) < 400 / (4 + svd.OVERSAMPLING)


def test_when_little_is_left_to_find():
    def converges(*gains, total=1000.0):
        return svd._converged(torch.tensor(gains, dtype=torch.float64).cumsum(0).tolist(), total)

    # The last gain was 1 of 100 in all: 1²/(before − 1) ≤ 4.5e-3·100 from a gain before of 3.22 on.
    assert converges(60, 20, 15.77, 3.23, 1) and not converges(60, 20, 15.79, 3.21, 1)
    assert converges(10, 0, 0) and not converges(10, 1, 0.9) and not converges(10, 1, 1) and not converges(10, 1)
    assert converges(1 - svd.COMPLETE, total=1.0) and not converges(1 - 2 * svd.COMPLETE, total=1.0)


def test_it_ends_where_the_blocks_span_everything(monkeypatch):
    monkeypatch.setattr(svd, "_converged", lambda captured, total: False)
    matrix = with_spectrum(140, 130, powers(130, 1 / 10))
    S, _ = check(matrix, 16)  # four blocks of 32 columns, and one of 2
    assert torch.allclose(S, torch.linalg.svdvals(matrix)[:16], rtol=1e-4)


def test_no_copy_of_the_matrix_is_made():
    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != matrix.data_ptr():
                    self.entries = max(self.entries, tensor.numel())
            return result

    for matrix in (with_spectrum(600, 500, powers(500, 1 / 4)), with_spectrum(500, 600, powers(500, 1 / 4))):
        before = matrix.clone()
        with Largest() as largest:
            truncated_svd(matrix, 2)
        assert 0 < largest.entries < matrix.numel() / 3
        assert torch.equal(matrix, before)


FLAWED = {
    "all singular values equal": lambda m: torch.eye(*m.shape),
    "two values": lambda m: torch.eye(*m.shape) + 2 * torch.eye(*m.shape) * (torch.arange(m.shape[1]) < 30),
    "rank 1": lambda m: torch.ones_like(m),
    "rank 40, more than a block": lambda m: m[:, :40] @ m[:40],
    "zero rows": lambda m: m * (torch.arange(len(m))[:, None] % 9 == 0),
    "zero columns": lambda m: m * (torch.arange(m.shape[1]) < 25),
    "one entry": lambda m: torch.zeros_like(m).index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(3.0)),
    "blocks a thousand times apart": lambda m: torch.block_diag(m[:20, :20], 1e-3 * m[20:, 20:]),
    "small": lambda m: 1e-12 * m,
    "large": lambda m: 1e12 * m,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flaw", FLAWED)
def test_degenerate_matrices(flaw, dtype):
    matrix = FLAWED[flaw](torch.randn(250, 160, generator=torch.Generator().manual_seed(0))).to(dtype)
    for rank in (1, 8, 20):
        check(matrix, rank, 2e-5 if dtype == torch.float32 else 1e-12)
        check(matrix.T, rank, 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype, resolved", [(torch.float32, 3e-4), (torch.float64, 3e-8)])
def test_singular_values_of_an_ill_conditioned_matrix(dtype, resolved):
    S = torch.cat([10 ** torch.linspace(0, -8, 40), torch.full((120,), 1e-8)]).double()
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 160, dtype=torch.float64, generator=generator)).Q for n in (250, 160))
    found, energy = check(((U * S) @ V.T).to(dtype), 20)
    assert (found - S[:20]).abs().max() < resolved and energy == pytest.approx(1)


def test_low_rank_matrix_is_recovered():
    S = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    matrix = with_spectrum(150, 90, S)
    U, found, Vh, energy = truncated_svd(matrix, 8)
    assert torch.allclose(found[:3], S.float(), rtol=1e-5) and found[3:].max() < 1e-5
    assert torch.allclose(U * found @ Vh, matrix, atol=1e-5)
    assert energy == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 60), in_=st.integers(1, 60), rank=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_factors_of_any_matrix(out, in_, rank, seed):
    matrix = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))
    U, S, Vh, energy = truncated_svd(matrix, rank, seed=seed)
    k = min(rank, out, in_)
    assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, in_))
    assert torch.allclose(U.T @ U, torch.eye(k), atol=1e-4) and torch.allclose(Vh @ Vh.T, torch.eye(k), atol=1e-4)
    assert (S >= 0).all() and (S.diff() <= 0).all()
    assert 0 < energy <= 1 and (energy > 1 - 1e-5 or k < min(out, in_))
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_same_seed_same_result_and_any_seed_the_same_subspace():
    matrix = with_spectrum(200, 150, torch.arange(1, 151, dtype=torch.float64) ** -0.5)
    one, same, other = (truncated_svd(matrix, 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], same[:3], strict=True))
    zero, default = truncated_svd(matrix, 4, seed=0), truncated_svd(matrix, 4)
    assert all(torch.equal(a, b) for a, b in zip(zero[:3], default[:3], strict=True))
    assert not torch.equal(one[0], other[0])
    assert torch.allclose(one[0] * one[1] @ one[2], other[0] * other[1] @ other[2], atol=0.02)


def test_bf16_matrix_is_computed_in_fp32():
    matrix = torch.randn(40, 30).bfloat16()
    U, S, Vh, _ = truncated_svd(matrix, 30)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    assert torch.allclose(U * S @ Vh, matrix.float(), atol=1e-4)


def test_zero_matrix_has_no_energy():
    assert truncated_svd(torch.zeros(4, 3), 2)[3] == 0


def test_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        truncated_svd(torch.ones(2, 2), 0)


def test_frobenius_norm_of_a_large_matrix_is_accurate():
    matrix = torch.full((2048, 4096), 0.1)
    exact = float(matrix[0, 0]) * matrix.numel() ** 0.5
    assert frobenius_norm(matrix) == pytest.approx(exact, rel=1e-5)
    assert float(torch.linalg.vector_norm(matrix)) != pytest.approx(exact, rel=1e-5)  # which is why we have our own
