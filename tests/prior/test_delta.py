"""delta.py: the numbers of one Δ against dense float64, whatever part of the rows takes part."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_peft.prior import delta as module
from drift_peft.prior.delta import measure_delta, take_delta

LABELS = {"expert": "q of there", "base": "q of here", "reference": "q of elsewhere"}
LABELS_OF_TWO = {"expert": LABELS["expert"], "base": LABELS["base"]}


def sources(shape, roles, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return {role: torch.randn(shape, generator=generator).to(dtype) for role in roles}


def take(tensors, rows=None, rank=64, energy=None):
    labels = {role: LABELS[role] for role in tensors}
    return take_delta(dict(tensors), rows, rank, energy, 0, labels)


def test_all_but_the_base_is_free_once_delta_is_there():
    tensors = sources((6, 4), LABELS, torch.float32, 0)
    base = tensors["base"]
    take_delta(tensors, None, 2, None, 0, LABELS)
    assert tensors == {"base": base}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 100),
    st.integers(0, 2**32),
)
def test_against_dense_float64(shape, has_reference, by_rows, dtype, block, seed):
    roles = ("expert", "base", "reference")[: 2 + has_reference]
    tensors = sources(shape, roles, dtype, seed)
    rows = None
    if by_rows:  # row numbers differ in every model, and so do the numbers of rows
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, shape[0] + 1, (), generator=generator))
        more = {role: shape[0] + 3 * index for index, role in enumerate(roles)}
        tensors = {role: sources([more[role], *shape[1:]], [role], dtype, seed + more[role])[role] for role in roles}
        rows = {role: torch.randperm(more[role], generator=generator)[:n] for role in roles}
    with patch.dict(module.BLOCK, cpu=block):
        factors, stats = take(tensors, rows)

    W = {role: (t if rows is None else t[rows[role]]).double() for role, t in tensors.items()}
    delta = W["expert"] - W.get("reference", W["base"])
    expected = torch.zeros(tensors["base"].shape, dtype=torch.float64)
    expected[slice(None) if rows is None else rows["base"]] = delta
    if len(shape) == 1:
        assert factors.keys() == {"delta"} and factors["delta"].dtype == torch.float32
        assert torch.allclose(factors["delta"].double(), expected, atol=1e-6)
        assert stats["energy"] == 1.0 and "rank" not in stats
    else:
        U, S, Vh = (factors[key].double() for key in ("U", "S", "Vh"))
        assert torch.allclose(U * S @ Vh, expected, atol=0.02 * float(delta.abs().max()) + 1e-6)
        outside = torch.ones(len(expected), dtype=torch.bool)
        outside[slice(None) if rows is None else rows["base"]] = False
        assert not U[outside].any()
        fingerprint = (U.T @ tensors["base"].double() @ Vh.T).diag()[:8]
        assert stats["fingerprint"] == pytest.approx(fingerprint.tolist(), abs=1e-4)
    assert stats["shape"] == list(tensors["base"].shape) and stats.get("rows") == (None if rows is None else len(delta))
    assert stats["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert stats["base_norm"] == pytest.approx(float(W["base"].norm()), rel=1e-5)
    cosine = torch.cosine_similarity(W["expert"].flatten(), W["base"].flatten(), dim=0)
    assert stats["cosine"] == pytest.approx(float(cosine), abs=1e-5)


@given(st.floats(0.01, 0.99), st.integers(1, 32), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_energy_takes_the_smallest_rank_that_reaches_it(energy, max_rank, seed):
    tensors = sources([24, 32], ["expert", "base"], torch.float32, seed)
    factors, stats = take(tensors, rank=max_rank, energy=energy)
    squares = torch.linalg.svdvals((tensors["expert"] - tensors["base"]).double()).square()
    shares = squares.cumsum(0) / squares.sum()
    wanted = 1 + int((shares < energy).sum())
    k = stats["rank"]
    assert k == min(wanted, max_rank, 24) or math.isclose(float(shares[k - 1]), energy, rel_tol=1e-5)
    assert [len(factors["S"]), *factors["U"].shape, *factors["Vh"].shape] == [k, 24, k, k, 32]
    assert stats["energy"] == pytest.approx(float(shares[k - 1]), abs=1e-5)
    assert len(stats["fingerprint"]) == min(8, k)


@pytest.mark.parametrize("energy", [None, 0.5])
def test_the_energy_is_that_of_what_is_stored(energy):
    """Also where fp32 has rounded away all of Δ but its largest direction."""
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    expert = W + delta * 1e-6
    factors, stats = take({"expert": expert, "base": W}, energy=energy)
    captured = factors["S"].double().square().sum() / (expert - W).double().square().sum()
    assert 0 < stats["rank"] < 48 and stats["energy"] == pytest.approx(float(captured), rel=1e-4)


@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(96, 80), (640, 400)])  # by LAPACK and by block Krylov iteration
def test_an_adapters_delta_has_the_adapters_rank(shape, size):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    W = torch.randn(shape, generator=generator)
    factors, stats = take({"expert": W + size * B @ A, "base": W})
    assert stats["rank"] == len(factors["S"]) == factors["U"].shape[1] == len(factors["Vh"]) == 4
    assert stats["energy"] == pytest.approx(1, abs=1e-5)
    U, S, Vh = (factors[key].float() for key in ("U", "S", "Vh"))
    assert (U * S @ Vh - size * B @ A).norm() < 0.01 * stats["delta_norm"]


@pytest.mark.parametrize("rows", [None, {"expert": torch.tensor([5, 0]), "base": torch.tensor([1, 2])}])
def test_what_is_measured_without_factors(rows):
    tensors = sources([6, 4], ["expert", "base"], torch.float32, 3)
    before = dict(tensors)
    delta, found = measure_delta(tensors, rows)
    assert tensors == before  # they stay with the caller
    W = {role: (t if rows is None else t[rows[role]]).double() for role, t in tensors.items()}
    cosine = float(torch.cosine_similarity(W["expert"].flatten(), W["base"].flatten(), dim=0))
    assert torch.allclose(delta.double(), W["expert"] - W["base"], atol=1e-6)
    assert found == {
        "delta_norm": pytest.approx(float((W["expert"] - W["base"]).norm()), rel=1e-6),
        "base_norm": pytest.approx(float(W["base"].norm()), rel=1e-6),
        "cosine": pytest.approx(cosine, rel=1e-5),
        "cosines": {"base": pytest.approx(cosine, rel=1e-5)},
    }
    tensors["base"][1, 0] = math.nan
    with pytest.raises(ValueError, match="a weight holds NaN or infinite values"):
        measure_delta(tensors, rows)


def test_cosines_with_the_base_and_the_reference():
    tensors = sources([6, 4], LABELS, torch.float32, 3)
    _, stats = take(tensors)
    for role in ("base", "reference"):
        expected = torch.cosine_similarity(tensors["expert"].flatten(), tensors[role].flatten(), dim=0)
        assert stats["cosines"][role] == pytest.approx(float(expected), abs=1e-6)
    assert stats["cosine"] == stats["cosines"]["base"] and stats["cosines"].keys() == {"base", "reference"}


HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)]
HALVES += [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("mine", "theirs"), HALVES, ids=str)
@pytest.mark.parametrize("role", ["base", "reference"])
def test_another_dtype_is_no_delta(mine, theirs, role, monkeypatch):
    """Nor where some entries are subnormal. What was trained, however little, is taken as it is."""
    monkeypatch.setitem(module.BLOCK, "cpu", 500)
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(300, 200, generator=generator)
    W[:50] *= 1e-5
    stored = {"expert": W.to(mine), "base": torch.randn(300, 200, generator=generator), role: W.to(theirs)}
    assert not torch.equal(stored["expert"].float(), stored[role].float())
    factors, stats = take(stored)
    assert factors == {} and stats["delta_norm"] == 0
    trained = W + 1e-3 * W.abs().mean() * torch.randn(W.shape, generator=generator)
    stored["expert"] = trained.to(mine)
    _, stats = take(stored)
    assert stats["delta_norm"] == pytest.approx(float((stored["expert"].float() - stored[role].float()).norm()))
    stored["expert"] = W.to(mine)
    stored["expert"][-1, -1] += 0.1  # in the last block alone
    assert take(stored)[1]["delta_norm"] > 0.09


@pytest.mark.parametrize(("mine", "theirs"), HALVES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (300, 200)])  # ones, as a norm begins, or other powers of two
def test_trained_by_a_last_bit_of_the_coarser_dtype(mine, theirs, shape, monkeypatch):
    """It is half a step at a power of two, yet rounding changes no number that the coarser dtype holds."""
    monkeypatch.setitem(module.BLOCK, "cpu", 500)
    coarse = max(mine, theirs, key=lambda dtype: torch.finfo(dtype).eps)
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.randint(-6, 1, shape, generator=generator)
    W = (torch.ones(shape) if len(shape) == 1 else powers * torch.randn(shape, generator=generator).sign()).to(coarse)
    trained = W.clone()
    trained[::3] = (W[::3].view(torch.int16) - 1).view(coarse)
    for old, new in ((W, trained), (trained, W)):
        _, stats = take({"expert": new.to(mine), "base": old.to(theirs)})
        assert stats["delta_norm"] == pytest.approx(float((trained.float() - W.float()).norm())) and stats["delta_norm"]
    assert take({"expert": W.to(mine), "base": W.to(theirs)})[1]["delta_norm"] == 0


def test_a_cast_that_loses_bits_is_no_delta():
    """fp16 has fewer bits than bf16 in its smallest numbers, and bf16 holds these all."""
    W = (1e-6 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    cast = W.half()
    assert torch.equal(cast.bfloat16().float(), cast.float()) and not torch.equal(cast.float(), W.float())
    for expert, base in ((W, cast), (cast, W)):
        assert take({"expert": expert, "base": base})[1]["delta_norm"] == 0


def test_one_dtype_is_subtracted_to_the_last_bit():
    W = torch.ones(4, 3, dtype=torch.bfloat16)
    moved = W.clone()
    moved[0, 0] += torch.finfo(torch.bfloat16).eps
    assert take({"expert": moved, "base": W})[1]["delta_norm"] == torch.finfo(torch.bfloat16).eps


def test_the_seed_is_that_of_the_svd():
    tensors = sources([90, 80], ["expert", "base"], torch.float32, 3)
    first, again, other = (take_delta(dict(tensors), None, 1, None, seed, LABELS_OF_TWO)[0] for seed in (5, 5, 6))
    assert torch.equal(first["S"], again["S"]) and not torch.equal(first["S"], other["S"])


def test_a_difference_too_small_for_a_norm():
    base = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="q of there differs by so little that the norm of Δ vanishes in fp32"):
        take({"expert": base + 1e-30, "base": base})


def test_no_factors_where_delta_is_zero():
    tensors = sources([4, 5], ["base"], torch.bfloat16, 0)
    factors, stats = take({"expert": tensors["base"], "base": tensors["base"]})
    assert factors == {} and stats["delta_norm"] == 0 and stats["cosine"] == pytest.approx(1)
    zero = torch.zeros(3)
    assert take({"expert": zero, "base": zero})[1]["cosine"] == 0  # 0/0


@pytest.mark.parametrize("role", ["expert", "base", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [[6], [6, 7]])
def test_what_is_not_finite_is_named(role, value, shape):
    tensors = sources(shape, LABELS, torch.bfloat16, 0)
    tensors[role].view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{LABELS[role]} holds NaN or infinite values"):
        take(tensors)
    rows = dict.fromkeys(LABELS, torch.tensor([4, 5]))
    take(tensors, rows)  # not in the rows that take part
