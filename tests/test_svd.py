"""svd.py against torch.linalg.svd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_peft import svd
from drift_peft.svd import frobenius_norm, truncated_svd


def with_spectrum(out, in_, S, seed=0):
    """A random matrix [out, in] with the singular values S."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(S), generator=generator, dtype=torch.float64)).Q for n in (out, in_))
    return ((U * S) @ V.T).float()


@pytest.mark.parametrize("shape", [(300, 300), (200, 700), (500, 250)])
@pytest.mark.parametrize("decay", [1 / 2, 1 / 4, 1 / 10])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_captured_energy_is_close_to_optimal_on_slowly_decaying_spectra(shape, decay, rank):
    assert min(shape) > svd.EXACT_BELOW * rank  # the randomized path
    matrix = with_spectrum(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay)
    U, S, Vh, energy = truncated_svd(matrix, rank)
    best = torch.linalg.svdvals(matrix.double())[:rank].square().sum() / matrix.double().square().sum()
    assert 0.995 * best <= energy <= best * (1 + 1e-5)
    # The reported energy is true of the factors: ‖M − USV‖² = (1 − energy)·‖M‖².
    error = (matrix - U * S @ Vh).double().square().sum() / matrix.double().square().sum()
    assert error == pytest.approx(1 - energy, abs=1e-5)


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
