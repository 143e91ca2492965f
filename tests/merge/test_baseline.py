"""merge_baseline: every method equals its formula in float64, and dare's choice follows from the seed."""

import math
import warnings
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from older import scales_what_dare_keeps
from trios import CROSS, FAMILIES, merge, save_trio, tensors, text_weights

import drift_peft.checkpoints.update
from drift_peft.choices import METHODS
from drift_peft.merge.baseline import MERGES, _merge

every_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=scales_what_dare_keeps if "dare" in name else ()) for name in METHODS]
)


# The formulas, in float64 and one weight at a time; τ as stored numbers give it in fp32, since trimming compares sizes.


def trim(tau, density):
    kept = int(density * tau.numel())
    least = tau.abs().flatten().sort(descending=True)[0][kept - 1] if kept else math.inf
    return torch.where(tau.abs() >= least, tau, 0)


def elect(taus, weights):
    sign = torch.where(sum(taus) >= 0, 1, -1)
    agreeing = [tau.sign() == sign for tau in taus]
    total = sum(w * tau * agrees for w, tau, agrees in zip(weights, taus, agreeing, strict=True))
    return total / sum(agrees.double() for agrees in agreeing).clamp(min=1)


def combine(taus, weights):
    return sum(w * tau for w, tau in zip(weights, taus, strict=True))


def outcomes(method, taus, weights, density):
    """Every value that an entry may take: one, or with dare one for each choice of what is kept."""
    if method in ("task_arithmetic", "layer_swap"):
        return [combine(taus, weights)]
    if method == "ties":
        return [elect([trim(tau, density) for tau in taus], weights)]
    join = elect if method == "dare_ties" else combine
    choices = [[0 * tau, tau / density] for tau in taus]
    return [join(chosen, weights) for chosen in ([[a] for a in choices[0]] if len(taus) == 1 else pairs(*choices))]


def pairs(first, second):
    return [[a, b] for a in first for b in second]


def error(found, expected):
    """Largest distance of an entry from the nearest of the values that it may take."""
    return torch.stack([(found.double() - value).abs() for value in expected]).amin(0).max().item()


# What is merged


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula(trios, tmp_path, monkeypatch, family, method):
    monkeypatch.setattr(drift_peft.checkpoints.update, "BLOCK", 3000)  # several blocks of rows a weight
    folder, cross = trios[family], CROSS.get(family, ())
    skipped = {"skip_first": 1} if method == "layer_swap" else {}
    report = merge(folder, method, tmp_path / "merged", reference=folder / "reference", **skipped)
    weights = {"task_arithmetic": (0.9, 0.1), "layer_swap": (0.9, 0.1)}.get(method, (1.6, 0.2))  # table 9
    density = None if weights == (0.9, 0.1) else 0.2
    V, E, R, merged = (
        text_weights(path, c)
        for path, c in [
            (folder / "base", cross),
            (folder / "expert", ()),
            (folder / "reference", ()),
            (report.output, cross),
        ]
    )
    moved = [name for name in E if method != "layer_swap" or not name.startswith("layers.0.")]
    assert report.weights == weights and report.density == density and report.merged == len(moved) > 8
    for name in moved:
        taus = [(V[name] - R[name]).double(), (E[name] - R[name]).double()]
        values = [R[name].double() + value for value in outcomes(method, taus, weights, density)]
        assert error(merged[name], values) < 1e-5 * V[name].abs().max(), name
        if density is None:
            assert error(values[0], [V[name].double()]) > 1e-4, name
    change = sum((merged[name] - V[name]).double().square().sum() for name in moved)
    assert report.relative_change == pytest.approx(
        math.sqrt(change / sum(V[name].double().square().sum() for name in moved)), rel=1e-4
    )


@every_method
@pytest.mark.parametrize("reference", [None, "reference"])
def test_one_scaled_task_vector(trios, tmp_path, method, reference):
    folder = trios["llama"]
    path = None if reference is None else folder / reference
    report = merge(folder, method, tmp_path / "merged", scale=0.7, reference=path, skip_first=0)
    V, E, merged = text_weights(folder / "base"), text_weights(folder / "expert"), text_weights(report.output)
    origin = V if path is None else text_weights(path)
    for name in E:
        values = outcomes(method, [(E[name] - origin[name]).double()], [0.7], 0.2)
        assert error(merged[name], [V[name].double() + value for value in values]) < 1e-5 * V[name].abs().max(), name
    assert report.weights == (0.7,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_fp32_and_cast_once(tmp_path, dtype):
    save_trio(tmp_path, "llama", dtype)
    for options in ({"scale": 0.3}, {"reference": tmp_path / "reference", "weights": (0.8, 0.3)}):
        merged, V, E, R = (
            text_weights(merge(tmp_path, **options).output if role is None else tmp_path / role)
            for role in (None, "base", "expert", "reference")
        )
        for name in merged:
            v, e, r = V[name].double(), E[name].double(), R[name].double()
            exact = v + 0.3 * (e - v) if "scale" in options else r + 0.8 * (v - r) + 0.3 * (e - r)
            half_step = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
            assert merged[name].dtype == dtype and ((merged[name].double() - exact).abs() <= half_step).all()


def test_layer_swap_is_br2vs(tmp_path):
    """Table 9: k = 5, and BR2V's code leaves layers 0 to 5 as they are. As first published, it transplants layers."""
    save_trio(tmp_path, "llama", shard="5GB", num_hidden_layers=8)
    V, E = text_weights(tmp_path / "base"), text_weights(tmp_path / "expert")
    swapped = text_weights(merge(tmp_path, "layer_swap").output)
    for name in V:
        kept = name.startswith("layers.") and int(name.split(".")[1]) <= 5
        torch.testing.assert_close(swapped[name], V[name] if kept else 0.9 * V[name] + 0.1 * E[name])
    whole = text_weights(merge(tmp_path, "layer_swap", scale=1, only_layers=[2], modules=["attn", "mlp"]).output)
    for name in V:
        torch.testing.assert_close(whole[name], (E if "layers.2." in name and "proj" in name else V)[name])


# Identities


def test_the_reference_cancels_out_of_weights_that_add_up_to_one(trios, tmp_path):
    folder = trios["llama"]
    plain, scaled = merge(folder, output=tmp_path / "plain"), merge(folder, output=tmp_path / "scaled", scale=0.1)
    same = merge(folder, output=tmp_path / "same", reference=folder / "reference")
    assert plain.weights == scaled.weights == (0.1,) and same.weights == (0.9, 0.1)
    for key, tensor in tensors(plain.output).items():
        assert torch.equal(tensor, tensors(scaled.output)[key])
        torch.testing.assert_close(tensor, tensors(same.output)[key], atol=1e-6, rtol=1e-5)


@scales_what_dare_keeps
def test_with_one_task_vector_and_all_entries_every_method_is_task_arithmetic(trios, tmp_path):
    folder = trios["llama"]
    expected = tensors(merge(folder, output=tmp_path / "merged", scale=0.6).output)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in ("ties", "dare_linear", "dare_ties"):
            merged = tensors(merge(folder, method, tmp_path / "merged", scale=0.6, density=1).output)
            assert all(torch.equal(merged[key], expected[key]) for key in expected), method
    assert not any("density" in str(warning.message) for warning in caught)  # of which PEFT warns


shapes = st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 30)))
numbers = st.floats(-2, 2, width=32)


@every_method
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.tuples(numbers, numbers), st.floats(0.05, 1), st.integers(1, 2), st.data())
def test_merge_of_one_weight(method, shape, weights, density, count, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    V, E, R = (torch.randn(shape, generator=generator) for _ in range(3))
    weights = weights[:count]
    with patch.object(drift_peft.checkpoints.update, "BLOCK", data.draw(st.sampled_from([1, 20, 10**6]))):
        sources = {"base": V, "expert": E, "reference": R}
        density = None if METHODS[method].density is None else density
        blocks = list(_merge(MERGES[method], sources, weights, density, "0 name"))
    taus = [(E - R).double()] if count == 1 else [(V - R).double(), (E - R).double()]
    anchor = (V if count == 1 else R).double()
    values = [anchor + value for value in outcomes(method, taus, weights, density)]
    assert error(torch.cat(blocks), values) < 1e-5 / (density or 1)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_blocks_of_rows_make_no_difference(method, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sources = {role: torch.randn(12, 30, generator=generator) for role in ("base", "expert", "reference")}
    arguments = MERGES[method], sources, (0.7, 0.4), 0.3 if method == "ties" else None, "0"
    (whole,) = _merge(*arguments)
    monkeypatch.setattr(drift_peft.checkpoints.update, "BLOCK", 70)
    blocks = list(_merge(*arguments))
    assert [len(block) for block in blocks] == [2] * 6 and torch.equal(torch.cat(blocks), whole)


def test_ties_where_all_agree_is_the_mean():
    R = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    step = R.sign() * R.abs().clamp(min=0.1)
    sources = {"base": R + step, "expert": R + 2 * step, "reference": R}
    (merged,) = _merge(MERGES["ties"], sources, (1.6, 0.2), 1.0, "0")
    torch.testing.assert_close(merged, R + (1.6 + 2 * 0.2) / 2 * step)


@scales_what_dare_keeps
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_expectation(method):
    generator = torch.Generator().manual_seed(0)
    W, delta = (torch.randn(64, 64, generator=generator) for _ in range(2))
    sources, runs, density = {"base": W, "expert": W + delta}, 200, 0.2
    steps = [next(_merge(MERGES[method], sources, (0.5,), density, f"{seed} w")) - W for seed in range(runs)]
    kept = torch.stack([(step.abs() > 1e-3 * delta.abs()).float().mean() for step in steps])
    assert kept.mean().item() == pytest.approx(density, abs=0.002)  # six standard errors
    assert kept.std().item() == pytest.approx(math.sqrt(density * (1 - density) / W.numel()), rel=0.2)
    deviation = ((sum(steps) / runs - 0.5 * delta).norm() / (0.5 * delta).norm()).item()
    assert deviation == pytest.approx(math.sqrt((1 / density - 1) / runs), rel=0.1)


# The random choice


@scales_what_dare_keeps
def test_the_seed_decides(trios, tmp_path):
    folder, state = trios["llama"], torch.get_rng_state()
    first = merge(folder, "dare_ties", tmp_path / "first", scale=0.5)
    again = merge(folder, "dare_ties", tmp_path / "again", scale=0.5)
    other = merge(folder, "dare_ties", tmp_path / "other", scale=0.5, seed=1)
    few = merge(folder, "dare_ties", tmp_path / "few", scale=0.5, only_layers=[1], modules=["mlp"])
    for file in {*first.output.iterdir()} - {first.output / "README.md"}:  # the card names its folder
        assert file.read_bytes() == (again.output / file.name).read_bytes()
    first, other, few = tensors(first.output), tensors(other.output), tensors(few.output)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], few[name])  # whatever else is merged
    base = tensors(folder / "base")
    kept = [first[key] != base[key] for key in (name, name.replace("1", "0"))]
    assert not torch.equal(*kept)  # each weight has a choice of its own
    assert torch.equal(state, torch.get_rng_state())
