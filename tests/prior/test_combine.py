"""combine and truncate: against dense float64, never dense themselves, and still recognizing their base."""

import json
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from dense_prior import GATES_FROM, dense_prior, stored, truncated
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import load, train, untouched, wrap
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llm
from torch.utils._python_dispatch import TorchDispatchMode

from drift_peft import DriftConfig, ReasoningPrior, telemetry
from drift_peft.prior.combine import formula
from drift_peft.prior.file import HEADER_KEY
from drift_peft.prior.prior import write_gated

Q, UP, NORM = "layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight"
EMBED = "embed_tokens.weight"
BF16 = 2**-8  # what rounding U and Vh to bf16 may cost, relative to the product


def random_priors(folder, count, out, into, rank, seed=0):
    """Priors of one base on two matrices and a vector; Δ of slowly decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    base = {Q: torch.randn(out, into, generator=generator), UP: torch.randn(into, out, generator=generator)}
    base[NORM] = 1 + torch.randn(out, generator=generator)
    priors = []
    for index in range(count):
        weights = {}
        for name, W in base.items():
            delta = torch.randn(W.shape, generator=generator, dtype=torch.float64)
            if W.dim() == 2:
                U, S, Vh = truncated(delta, min(W.shape))
                delta = U @ torch.diag(torch.arange(1, len(S) + 1, dtype=torch.float64) ** -0.5) @ Vh
            weights[name] = W, delta
        priors.append(dense_prior(folder / f"{index}.safetensors", weights, rank, expert=f"org/expert{index}"))
    return priors


@st.composite
def sums(draw):
    count = draw(st.integers(1, 3))
    coefficients = st.floats(-2, 2).filter(lambda c: abs(c) > 0.05)
    return {
        "coefficients": draw(st.lists(coefficients, min_size=count, max_size=count)),
        "out": draw(st.integers(2, 24)),
        "into": draw(st.integers(2, 24)),
        "rank": draw(st.integers(1, 10)),
        "to": draw(st.one_of(st.none(), st.integers(1, 30))),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=40, deadline=None)
@given(sums())
def test_the_sum_is_the_best_approximation_of_the_dense_one(case):
    c = case["coefficients"]
    with tempfile.TemporaryDirectory() as folder:
        parents = random_priors(Path(folder), len(c), case["out"], case["into"], case["rank"], case["seed"])
        output = Path(folder, "sum.safetensors")
        combined = ReasoningPrior.combine(zip(parents, c, strict=True), output, rank=case["to"])
        rank = case["to"] or min(case["rank"], case["out"], case["into"])
        assert list(combined) == list(parents[0]) and combined.metadata["rank"] == rank
        for name, weight in combined.items():
            exact = sum(x * stored(parent[name]) for x, parent in zip(c, parents, strict=True))
            if name == NORM:
                torch.testing.assert_close(weight.delta.double(), exact, rtol=1e-5, atol=1e-6)
                assert weight.delta_norm == pytest.approx(exact.norm().item(), rel=1e-5)
                continue
            U, S, Vh = truncated(exact, rank)
            optimum = (exact - U @ torch.diag(S) @ Vh).norm()
            size = sum(abs(x) * parent[name].S[0].item() for x, parent in zip(c, parents, strict=True))
            assert (stored(weight) - exact).norm() <= optimum + 2 * BF16 * exact.norm() + 1e-5 * size
            torch.testing.assert_close(weight.S.double(), S[: len(weight.S)], rtol=1e-4, atol=1e-5 * size)
            assert (S[len(weight.S) :] <= 2e-5 * size).all()  # cut only where it is rounding
            residues = sum(
                x**2 * (p[name].delta_norm ** 2 - p[name].S.double().square().sum().item())
                for x, p in zip(c, parents, strict=True)
            )
            norm = math.sqrt(exact.square().sum().item() + max(0, residues))
            assert weight.delta_norm == pytest.approx(norm, rel=1e-4)
            assert weight.energy == pytest.approx(S.square().sum().item() / weight.delta_norm**2, rel=1e-3)
            assert weight.base_norm == parents[0][name].base_norm
            assert weight.cosine == min(parent[name].cosine for parent in parents)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_truncation_keeps_the_first_directions(out, into, rank, to, seed):
    with tempfile.TemporaryDirectory() as folder:
        (prior,) = random_priors(Path(folder), 1, out, into, rank, seed)
        low = prior.truncate(to, Path(folder, "low.safetensors"))
        for name in (Q, UP):
            k = min(to, rank, out, into)
            assert low[name].S.tolist() == prior[name].S[:k].tolist()
            assert torch.equal(low[name].U, prior[name].U[:, :k]) and torch.equal(low[name].Vh, prior[name].Vh[:k])
            assert low[name].fingerprint == prior[name].fingerprint[: min(8, k)]
            energy = low[name].S.double().square().sum().item() / prior[name].delta_norm ** 2
            assert low[name].energy == pytest.approx(energy, rel=1e-6)
        assert torch.equal(low[NORM].delta, prior[NORM].delta) and low.metadata["rank"] == min(to, rank)
        if to >= rank:
            assert low.path.read_bytes() == prior.path.read_bytes()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_a_weights_size_is_formed(tmp_path):
    parents = random_priors(tmp_path, 3, 200, 150, rank=4)
    with Largest() as seen:
        combined = ReasoningPrior.combine(dict.fromkeys(parents, 0.5), tmp_path / "sum")
        combined.truncate(2, tmp_path / "low")
    assert 0 < seen.numel <= 200 * 3 * 4


def test_weights_that_a_parent_lacks_are_zero_there(tmp_path):
    both, _ = random_priors(tmp_path, 2, 12, 9, rank=3)
    only = dense_prior(
        tmp_path / "q", {Q: (torch.randn(12, 9), torch.randn(12, 9))}, base="org/other", not_steered=[UP]
    )
    only.metadata["weights"][Q]["base_norm"] = both[Q].base_norm
    combined = ReasoningPrior.combine([(both, 2), (only, -1)], tmp_path / "sum", rank=20)
    torch.testing.assert_close(stored(combined[UP]), 2 * stored(both[UP]), rtol=0, atol=0.05)
    torch.testing.assert_close(stored(combined[Q]), 2 * stored(both[Q]) - stored(only[Q]), rtol=0, atol=0.1)
    torch.testing.assert_close(combined[NORM].delta, 2 * both[NORM].delta)
    assert combined[UP].delta_norm == pytest.approx(2 * both[UP].delta_norm, rel=1e-2)
    assert combined.metadata["not_steered"] == []


def of_another_name(prior, path):
    """The same Δ, in the name of another expert."""
    header = {**prior.metadata, "expert": {"id": "org/another", "revision": None}}
    save_file(load_file(prior.path), path, {HEADER_KEY: json.dumps(header)})
    return ReasoningPrior.load(path)


def test_a_prior_that_is_not_in_the_sum_says_nothing(tmp_path):
    a, b, _ = random_priors(tmp_path, 3, 12, 9, rank=2)
    alone = ReasoningPrior.combine({a: 0.7}, tmp_path / "alone")
    for parts in ([(a, 0.7), (b, 0)], [(b, 0.0), (a, 0.7)], [(b, 2), (a, 0.7), (b, -2)], [(a, 0.4), (a, 0.3)]):
        combined = ReasoningPrior.combine(parts, tmp_path / "sum", overwrite=True)
        assert combined.path.read_bytes() == alone.path.read_bytes(), parts
    # What each half did not capture is the same, and adds up.
    halves = ReasoningPrior.combine([(a, 0.5), (a, 0.5)], tmp_path / "halves")
    assert halves[Q].delta_norm == pytest.approx(a[Q].delta_norm, rel=1e-3)


def test_the_order_of_the_parents_does_not_decide_the_bases_norm(tmp_path):
    """Of an embedding each has measured its own rows."""
    parents = []
    for rows in (5, 8):
        values = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(rows))
        values[0] = torch.arange(36).reshape(9, 4)
        values[:, rows:] = 0
        parents.append(dense_prior(tmp_path / f"{rows}", {EMBED: values}, rank=4, expert=f"org/{rows}"))
        parents[-1].metadata["weights"][EMBED]["rows"] = rows
    norms = [parent[EMBED].base_norm for parent in parents]
    for index, order in enumerate((parents, parents[::-1])):
        combined = ReasoningPrior.combine([(parent, 0.5) for parent in order], tmp_path / f"sum{index}")
        assert combined[EMBED].base_norm == max(norms) > min(norms)


def test_what_cancels_is_not_steered(tmp_path):
    whole, _ = random_priors(tmp_path, 2, 12, 9, rank=3)
    part = dense_prior(tmp_path / "part", {Q: (torch.ones(12, 9), torch.ones(12, 9))})
    part.metadata["weights"][Q]["base_norm"] = whole[Q].base_norm
    same = of_another_name(whole, tmp_path / "same")
    combined = ReasoningPrior.combine([(whole, 1), (part, 0.5), (part, -0.5), (same, -1), (part, 3)], tmp_path / "sum")
    assert list(combined) == [Q] and combined.metadata["not_steered"] == sorted([UP, NORM])
    assert len(combined[Q].S) == 1  # the rest is rounding
    with pytest.raises(ValueError, match="the sum is zero in every weight"):
        ReasoningPrior.combine([(whole, 1), (same, -1)], tmp_path / "none")
    with pytest.raises(ValueError, match="the sum is zero in every weight"):
        ReasoningPrior.combine([(whole, 1), (whole, -1)], tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_rows_without_a_counterpart_stay_zero(tmp_path):
    priors, generator = [], torch.Generator().manual_seed(0)
    W = torch.randn(30, 16, generator=generator)
    for index, rows in enumerate((range(3, 23), range(5, 25))):
        delta = torch.zeros(30, 16)
        delta[list(rows)] = torch.randn(20, 16, generator=generator)
        priors.append(dense_prior(tmp_path / f"{index}", {"lm_head.weight": (W, delta)}, rank=16))
        priors[-1].metadata["weights"]["lm_head.weight"]["rows"] = 20
    combined = ReasoningPrior.combine(dict.fromkeys(priors, 1.0), tmp_path / "sum")
    U = combined["lm_head.weight"].U
    assert not U[:3].any() and not U[25:].any() and U[3:25].any(dim=1).all()
    assert combined.metadata["weights"]["lm_head.weight"]["rows"] == 22


def test_vocabularies_that_differ_are_of_one_base(tmp_path):
    """The norm of the head is then one of other rows."""
    generator = torch.Generator().manual_seed(0)
    W, deltas = torch.randn(30, 16, generator=generator), torch.randn(2, 30, 16, generator=generator)
    weights, priors = {Q: (W, deltas[0]), "lm_head.weight": (W, deltas[1])}, []
    for rows in (20, 25, None):
        priors.append(dense_prior(tmp_path / f"{rows}", weights, expert=f"org/{rows}"))
        if rows:
            stats = priors[-1].metadata["weights"]["lm_head.weight"]
            stats |= {"rows": rows, "base_norm": W[:rows].norm().item()}
    assert list(ReasoningPrior.combine(dict.fromkeys(priors, 1.0), tmp_path / "sum")) == list(weights)
    same = dense_prior(tmp_path / "same", weights, expert="org/same")
    same.metadata["weights"]["lm_head.weight"] |= {"rows": 20, "base_norm": 1.0}
    with pytest.raises(ValueError, match=r"different bases: ‖W‖ of lm_head\.weight is"):
        ReasoningPrior.combine([(priors[0], 1), (same, 1)], tmp_path / "none")


def test_bases_of_other_names_are_said(tmp_path):
    """A near fine-tune has the same norms, to second order."""
    W, delta = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.ones(6, 5)
    here, there = (dense_prior(tmp_path / n, {Q: (W, delta)}, base=f"org/{n}") for n in ("vlm", "other"))
    with pytest.warns(UserWarning, match=r"was built for vlm and .* for other: their sum steers neither"):
        ReasoningPrior.combine({here: 1.0, there: 1.0}, tmp_path / "sum")


def test_header_names_the_parents(tmp_path):
    a, b, _ = random_priors(tmp_path, 3, 6, 5, rank=2)
    low = a.truncate(1, tmp_path / "low")
    combined = ReasoningPrior.combine({str(a.path): 0.7, b: -0.3}, tmp_path / "sum")
    parents = combined.metadata["parents"]
    assert [(p["weight"], p["sha256"]) for p in parents] == [(0.7, a.sha256), (-0.3, b.sha256)]
    assert parents[0]["expert"] == a.metadata["expert"] and combined.metadata["base"] == a.metadata["base"]
    assert combined.metadata["expert"] is None and "orthogonal" in combined.metadata["estimates"]["delta_norm"]
    assert formula(low.metadata) == "expert0 − vlm"
    assert formula(combined.metadata) == "0.7·(expert0 − vlm) -0.3·(expert1 − vlm)"
    twice = ReasoningPrior.combine({combined: 2}, tmp_path / "twice")
    assert formula(twice.metadata) == "2·(0.7·(expert0 − vlm) -0.3·(expert1 − vlm))"
    again = ReasoningPrior.combine([(a, 0.7), (b, -0.3)], tmp_path / "again", rank=2)
    assert again.path.read_bytes() == combined.path.read_bytes()
    with pytest.raises(FileExistsError, match="again exists: name another file"):
        ReasoningPrior.combine([(a, 0.7)], tmp_path / "again")
    assert ReasoningPrior.combine([(combined, 1)], tmp_path / "again", overwrite=True).rank == 2


def test_what_a_prior_is_made_of_is_not_replaced_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, _ = random_priors(tmp_path, 3, 6, 5, rank=2)
    before = a.path.read_bytes()
    for output in (a.path.name, a.path):
        for write in (
            lambda out: a.truncate(1, out, True),
            lambda out: ReasoningPrior.combine({b: 1, a: 1}, out, 1, True),
        ):
            with pytest.raises(
                FileExistsError, match=rf"output \S+ is {a.path}, which it is made of: name another file"
            ):
                write(output)
    assert a.path.read_bytes() == before


REFUSED = {
    "nothing": ([], "there is nothing to combine"),
    "infinite": ([("a", math.inf)], "the coefficient of .*0.safetensors must be a finite number, got inf"),
    "no number": ([("a", "much")], "must be a finite number, got 'much'"),
    "zeros": ([("a", 0), ("b", 0.0)], "all coefficients are 0"),
    "norm": ([("a", 1), ("norm", 1)], r"different bases: ‖W‖ of layers.0.self_attn.q_proj.weight is \S+ in one and"),
    "shape": (
        [("a", 1), ("b", 1), ("shape", 1)],
        r"different bases: .*q_proj.weight is \[6, 5\] in one and \[5, 6\] in",
    ),
    "name": ([("a", 1), ("name", 1)], "org/vlm and org/other, and have no matrix in common .*: build both from one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    priors = dict(zip("ab", random_priors(tmp_path, 2, 6, 5, rank=2), strict=True))
    W, delta = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.ones(6, 5)  # W is the base's own
    for name, weights, base in (
        ("norm", {Q: (W * 1.001, delta)}, "org/vlm"),
        ("shape", {Q: (W.T, delta.T)}, "org/vlm"),
        ("name", {"layers.7.mlp.up_proj.weight": (W, delta)}, "org/other"),
    ):
        priors[name] = dense_prior(tmp_path / name, weights, base=base)
    parts, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        ReasoningPrior.combine([(priors[name], c) for name, c in parts], tmp_path / "sum")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("sum*"))


def test_one_folder_by_two_spellings_is_one_base(tmp_path, monkeypatch):
    """Where no matrix is in both, the place of the base tells."""
    monkeypatch.chdir(tmp_path)
    W, delta = torch.randn(6, 5), torch.ones(6, 5)
    one = dense_prior(tmp_path / "attn", {Q: (W, delta)}, base="models/vlm")
    other = dense_prior(tmp_path / "mlp", {"layers.7.mlp.up_proj.weight": (W, delta)}, base=f"{tmp_path}/models/vlm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ReasoningPrior.combine([(one, 1), (other, 1)], tmp_path / "sum")) == 2


def test_a_gated_prior_is_truncated_as_a_sum_of_itself(tmp_path):
    """Of its gates the header would tell more than the file holds, and its hash would be another prior's."""
    W, delta = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    prior = dense_prior(tmp_path / "p", {Q: (W, delta)}, rank=4)
    gates = {name: torch.tensor([0.1, 0.9, 0.5, 0.7]) for name in prior}
    products = {name: torch.zeros(4) for name in prior}
    gated = write_gated(prior, gates, products, tmp_path / "gated", GATES_FROM)
    small = gated.truncate(2, tmp_path / "small")
    for name in gated:
        whole, part = (p[name].U.float() * p[name].S @ p[name].Vh.float() for p in (gated, small))
        best = torch.linalg.svd(whole.double()).S[2:].norm().item()
        assert (whole - part).norm().item() == pytest.approx(best, rel=0.02)
    (parent,) = small.metadata["parents"]
    assert small.rank == 2 and parent["sha256"] == gated.sha256 and parent["gated"]["prior"] == prior.sha256
    assert "gated" not in small.metadata and all("gates" not in w for w in small.metadata["weights"].values())
    assert f"1),  # sha256 {gated.sha256}" in small.model_card().text and "rank=2)" in small.model_card().text


def test_weights_whose_gates_have_closed_are_left_out(tmp_path):
    W, delta = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    prior = dense_prior(tmp_path / "p", {Q: (W, delta), UP: (W, delta)}, rank=4)
    gates, products = {Q: torch.zeros(4), UP: torch.ones(4)}, dict.fromkeys((Q, UP), torch.zeros(4))
    gated = write_gated(prior, gates, products, tmp_path / "gated", GATES_FROM)
    assert [*gated] == [UP] and gated.metadata["not_steered"] == [Q]
    before = (tmp_path / "gated").read_bytes()
    with pytest.raises(ValueError, match="every gate has closed, so that the prior would steer nothing: train"):
        write_gated(prior, {Q: gates[Q], UP: gates[Q]}, products, tmp_path / "gated", GATES_FROM, overwrite=True)
    assert (tmp_path / "gated").read_bytes() == before


@pytest.mark.parametrize("c", [1e39, 10**400, -(10**400), 3e38])
def test_sums_that_fp32_cannot_hold(tmp_path, c):
    (prior,) = random_priors(tmp_path, 1, 6, 5, rank=2)
    with pytest.raises(ValueError, match=r"must be a finite number, got|larger than fp32 can hold: choose smaller"):
        ReasoningPrior.combine({prior: c}, tmp_path / "sum")
    assert not [*tmp_path.glob("sum*")]


def test_sums_of_vectors_at_the_ends_of_fp32(tmp_path):
    generator = torch.Generator().manual_seed(0)
    prior = dense_prior(tmp_path / "p", {NORM: torch.randn(2, 400, generator=generator)})
    for c in (1e-25, 1e-30):
        small = ReasoningPrior.combine({prior: c}, tmp_path / f"{c}")  # which is opened again
        assert small[NORM].delta_norm == pytest.approx(c * prior[NORM].delta_norm, rel=1e-5)
    with pytest.raises(ValueError, match="the sum is zero in every weight"):
        ReasoningPrior.combine({prior: 1e-60}, tmp_path / "sum")
    with pytest.raises(ValueError, match="the sum is larger than fp32 can hold: choose smaller coefficients"):
        ReasoningPrior.combine({prior: 3e38}, tmp_path / "sum")
    assert not [*tmp_path.glob("sum*")]


@pytest.mark.parametrize("parts", ["a", 5, None, ["a", "b"], [("a",)], ReasoningPrior])
def test_what_is_no_sum_of_priors(tmp_path, parts):
    with pytest.raises(ValueError, match=r"^parts must be a dict of .* or a list, .*, got "):
        ReasoningPrior.combine(parts, tmp_path / "sum")


@pytest.mark.parametrize("wrong", [{"output": 5}, {"output": ""}, {"overwrite": "no"}, {"overwrite": 1}])
def test_arguments_of_combine_that_are_none(tmp_path, wrong):
    (prior,) = random_priors(tmp_path, 1, 6, 5, rank=2)
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} (must be|is empty)"):
        ReasoningPrior.combine({prior: 1}, **{"output": tmp_path / "x", **wrong})
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("rank", [0, True, 2.5])
def test_a_rank_that_is_none(tmp_path, rank):
    (prior,) = random_priors(tmp_path, 1, 6, 5, rank=2)
    with pytest.raises(ValueError, match=r"rank must be a whole number.*, got"):
        prior.truncate(rank, tmp_path / "x")
    with pytest.raises(ValueError, match="rank must be a whole number ≥ 1, got"):
        ReasoningPrior.combine({prior: 1}, tmp_path / "x", rank)


# The base is recognized by the parents' directions


@pytest.fixture(scope="module")
def combined(pairs, tmp_path_factory):
    """family -> a sum of two priors of different rank and modules, combined and truncated once more."""
    folder = tmp_path_factory.mktemp("combined")

    def make(family):
        prior = ReasoningPrior.load(pairs(family) / "prior.safetensors")
        low = prior.truncate(3, folder / f"{family}-low", overwrite=True)
        once = ReasoningPrior.combine({prior: 0.9, low: 0.3}, folder / f"{family}-once", overwrite=True)
        twice = ReasoningPrior.combine({once: 0.5, low: -0.1}, folder / f"{family}-twice", overwrite=True)
        return twice.truncate(4, folder / f"{family}", overwrite=True)

    return make


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_a_combined_prior_steers_its_base(pairs, combined, family, kind):
    prior = combined(family)
    assert {name for name, *_ in prior.probes()} == set(prior) and not any(w.fingerprint for w in prior.values())
    model = wrap(load(pairs(family), family, kind), DriftConfig(prior=prior.path, r=4, drift_alpha=1.0))
    assert telemetry(train(model))["alignment"] > 0.2


def test_a_combined_prior_refuses_another_base(combined):
    model = tiny_llm("llava", seed=5)
    with pytest.raises(ValueError, match=r"built for other base weights: its fingerprint is off by 1\d\d%"):
        get_peft_model(model, DriftConfig(prior=combined("llama").path, r=4))
    assert untouched(model)


def test_probes_are_chosen_by_name_alone(tmp_path):
    names = [f"layers.{i}.mlp.{p}_proj.weight" for i in range(16) for p in ("up", "gate", "down")]
    W = torch.randn(4, 3)
    chosen = []
    for index, some in enumerate((names, names[::-1], [*names, "lm_head.weight"])):
        prior = dense_prior(tmp_path / f"{index}", {name: (W, W) for name in some})
        chosen.append([name for name, *_ in prior.probes()])
    assert chosen[0] == chosen[1] == chosen[2] and len(chosen[0]) == 16
    assert len({name.split(".")[1] for name in chosen[0]}) > 6 and len({name.split(".")[3] for name in chosen[0]}) == 3
    head = dense_prior(tmp_path / "head", {"lm_head.weight": (W, W), "norm.weight": (W[0], W[0])})
    assert [name for name, *_ in head.probes()] == ["lm_head.weight"]
    combined = ReasoningPrior.combine([(ReasoningPrior.load(tmp_path / "2"), 1), (head, 1)], tmp_path / "sum")
    assert [name for name, *_ in combined.probes()] == chosen[0]
    assert json.dumps(combined.metadata).count('"probe"') == 17
