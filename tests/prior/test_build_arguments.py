"""build.py's arguments: what is taken of Δ, wrong values, and an output that exists."""

import os

import pytest
import torch
from known_delta import build, matrix
from tiny import edit_config, rename_keys, save_layout, save_tokenizer, tiny_expert, tiny_llm, tiny_vlm

from drift_peft.prior.prior import ReasoningPrior


def test_a_weight_does_not_depend_on_the_selection(pair, tmp_path):
    everything, attention = build(tmp_path, rank=4), build(tmp_path, rank=4, modules="attn", output=tmp_path / "attn")
    assert len(attention) == 8
    assert all(torch.equal(everything[name].U, attention[name].U) for name in attention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number ≥ 1, got 0"),
        ({"rank": -3}, "rank must be a whole number ≥ 1, got -3"),
        ({"rank": 2.5}, "rank must be a whole number or None, got 2.5"),
        ({"rank": "8"}, "rank must be a whole number or None, got '8'"),
        ({"rank": True}, "rank must be a whole number or None, got True"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"energy": 1.0}, "energy must be a number between 0 and 1, got 1.0"),
        ({"energy": "most"}, "energy must be a number or None, got 'most'"),
        ({"energy": 0.9, "rank": 8}, "give rank=8 or energy=0.9, not both: with energy, max_rank is the ceiling"),
        ({"energy": 0.9, "max_rank": 0}, "max_rank must be a whole number ≥ 1, got 0"),
        ({"max_rank": 8}, "max_rank=8 goes with energy: without it, rank is the ceiling"),
        ({"only_layers": []}, "only_layers is empty: leave it out for all layers"),
        ({"only_layers": [0, -1]}, "each of only_layers must be a whole number ≥ 0, got -1"),
        ({"only_layers": ["0"]}, "only_layers must be None or a list, each entry of it a whole number, got"),
        ({"skip_first": -2}, "skip_first must be a whole number ≥ 0, got -2"),
        ({"modules": ["attention"]}, "modules='attention' is unknown: choose from attn, mlp, norm, bias, head, embed"),
        ({"modules": []}, "modules is empty"),
        ({"device": "meta"}, "device meta computes nothing: name one that does, such as cpu"),
        ({"device": "warp"}, "device warp is not available"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **arguments)  # the checkpoints do not even exist
    assert os.listdir(tmp_path) == []


def test_an_existing_output_is_kept_unless_overwritten(pair, tmp_path):
    (tmp_path / "p.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"p.safetensors exists: .*overwrite=True \(--overwrite\)"):
        build(tmp_path)
    with pytest.raises(ValueError):
        build(tmp_path, expert=tmp_path / "vlm", overwrite=True)  # fails after the work has begun
    assert (tmp_path / "p.safetensors").read_text() == "mine"
    build(tmp_path, overwrite=True)
    assert len(ReasoningPrior.load(tmp_path / "p.safetensors")) == 14


def test_an_existing_output_of_the_same_build_is_taken(pair, tmp_path, monkeypatch):
    built = build(tmp_path, exist_ok=True)
    before = built.path.stat()
    monkeypatch.setattr("drift_peft.prior.build._take_deltas", None)  # which would be a second build
    assert build(tmp_path, exist_ok=True).sha256 == built.sha256
    assert built.path.stat() == before and not list(tmp_path.glob("*.partial"))
    (tmp_path / "expert").rename(tmp_path / "elsewhere")
    assert build(tmp_path, expert=tmp_path / "elsewhere", exist_ok=True).sha256 == built.sha256
    with pytest.raises(ValueError, match="give exist_ok=True, which takes an existing output, or overwrite=True"):
        build(tmp_path, expert=tmp_path / "elsewhere", exist_ok=True, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "was built with rank=64, not 3: name another output"),
        ({"modules": ["attn"]}, r"was built with modules=\['attn', 'mlp'\], not \['attn'\]"),
        ({"seed": 1}, "was built with seed=0, not 1"),
        ({"reference": "vlm"}, "was built without a reference, unlike this one: name another output"),
        ({"expert": "other"}, "was built of other models than .*other and .*vlm"),
    ],
)
def test_an_existing_output_of_another_build_is_refused(pair, tmp_path, change, message):
    save_layout(tiny_expert("llava", tiny_vlm("llava"), seed=7)[0], tmp_path / "other")
    built = build(tmp_path)
    places = {key: tmp_path / value for key, value in change.items() if key in ("reference", "expert")}
    with pytest.raises(FileExistsError, match=message):
        build(tmp_path, exist_ok=True, **{**change, **places})
    assert ReasoningPrior.load(tmp_path / "p.safetensors").sha256 == built.sha256


def test_vectors_are_kept_whole(tmp_path):
    vlm = tiny_vlm("qwen2_5_vl")
    expert, _ = tiny_expert("qwen2_5_vl", vlm)
    base, state = vlm.get_decoder().state_dict(), expert.get_decoder().state_dict()
    vectors = {name for name, value in state.items() if value.dim() == 1}
    generator = torch.Generator().manual_seed(5)
    for name in vectors - {"norm.weight"}:
        state[name] += torch.randn(state[name].shape, generator=generator)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert")
    prior = build(tmp_path, modules=["bias", "norm"])
    assert prior.metadata["modules"] == ["norm", "bias"] and prior.metadata["not_steered"] == ["norm.weight"]
    assert prior.keys() == vectors - {"norm.weight"} and len(prior) == 10
    for name, vector in prior.items():
        delta = state[name] - base[name]
        assert torch.equal(vector.delta, delta)
        assert vector.delta_norm == pytest.approx(float(delta.norm()))
        assert vector.base_norm == pytest.approx(float(base[name].norm()))
    # A bias that starts from zero has no cosine with the expert's, and that stops nothing.
    assert prior["layers.0.self_attn.q_proj.bias"].cosine == 0


def test_rows_of_head_and_embedding_by_token(tmp_path):
    vlm = tiny_vlm("llava")  # 64 rows, untied
    expert = tiny_llm("llava", vocab_size=80)
    order = torch.randperm(79, generator=torch.Generator().manual_seed(0))[:50]  # rows of the 50 common tokens
    rows = torch.randperm(63, generator=torch.Generator().manual_seed(1))[:50]
    delta = {}
    for seed, module in enumerate(("get_input_embeddings", "get_output_embeddings")):
        W, theirs = getattr(vlm, module)().weight.detach(), getattr(expert, module)().weight.detach()
        noise = 0.1 * W.std() * torch.randn(50, 64, generator=torch.Generator().manual_seed(seed))
        theirs[order] = W[rows] + noise
        delta[module] = torch.zeros(64, 64).index_copy_(0, rows, noise)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert")
    save_tokenizer(tmp_path / "vlm", {f"token {i}": int(row) for i, row in enumerate(rows)} | {"<image>": 63})
    save_tokenizer(tmp_path / "expert", {f"token {i}": int(row) for i, row in enumerate(order)} | {"[PAD]": 79})

    prior = build(tmp_path, modules=["head", "embed"])
    assert [*prior] == ["embed_tokens.weight", "lm_head.weight"]
    for (name, weight), (module, known) in zip(prior.items(), delta.items(), strict=True):
        assert torch.allclose(matrix(weight), known, atol=1e-2 * float(known.abs().max()))
        others = torch.ones(64, dtype=torch.bool).index_fill_(0, rows, False)
        assert not weight.U[others].any()
        assert prior.metadata["weights"][name]["rows"] == 50 and prior.metadata["weights"][name]["shape"] == [64, 64]
        base = getattr(vlm, module)().weight.detach()
        assert weight.base_norm == pytest.approx(float(base[rows].norm()), rel=1e-5)
        cosine = torch.cosine_similarity((base + known)[rows].flatten(), base[rows].flatten(), dim=0)
        assert weight.cosine == pytest.approx(float(cosine), abs=1e-5)
        fingerprint = (weight.U.float().T @ base @ weight.Vh.float().T).diag()[:8]
        assert weight.fingerprint == pytest.approx(fingerprint.tolist(), abs=1e-5)


def test_a_tied_expert_has_its_embedding_as_head(pair, tmp_path):
    rename_keys(tmp_path / "expert", lambda key: None if key == "lm_head.weight" else key)
    edit_config(tmp_path / "expert", tie_word_embeddings=True)
    for side in ("vlm", "expert"):
        save_tokenizer(tmp_path / side, {f"token {i}": i for i in range(64)})
    prior = build(tmp_path, modules=["head"], force=True)  # two unrelated random matrices
    vlm = tiny_vlm("llava")
    expected = vlm.get_input_embeddings().weight - vlm.get_output_embeddings().weight
    assert torch.allclose(matrix(prior["lm_head.weight"]), expected, atol=2e-3)


def test_energy_instead_of_a_rank(pair, tmp_path):
    prior = build(tmp_path, energy=0.6, max_rank=20)
    assert {key: prior.metadata[key] for key in ("rank", "energy", "max_rank")} == {
        "rank": 20, "energy": 0.6, "max_rank": 20,
    }  # fmt: skip
    ranks = set()
    for name, weight in prior.items():
        shares = torch.linalg.svdvals(pair[name]).square().cumsum(0) / pair[name].norm() ** 2
        k = len(weight.S)
        assert k == min(20, 1 + int((shares < 0.6).sum())) == prior.metadata["weights"][name]["rank"]
        assert weight.energy == pytest.approx(float(shares[k - 1]), abs=1e-4)
        assert weight.energy >= 0.6 or k == 20
        ranks.add(k)
    assert len(ranks) > 2 and 20 in ranks
    assert build(tmp_path, energy=0.6, output=tmp_path / "default").metadata["max_rank"] == 256
    assert build(tmp_path, output=tmp_path / "rank").metadata["rank"] == 64


def test_layers(pair, tmp_path):
    prior = build(tmp_path, only_layers=[1, 1])
    assert len(prior) == 7 and {name.split(".")[1] for name in prior} == {"1"}
    assert (prior.metadata["only_layers"], prior.metadata["skip_first"]) == ([1], 0)
    skipped = build(tmp_path, skip_first=1, output=tmp_path / "skipped")
    assert [*skipped] == [*prior] and (skipped.metadata["only_layers"], skipped.metadata["skip_first"]) == (None, 1)
