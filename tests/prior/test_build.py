"""build.py: the prior is the known Δ for every family, and nothing matches in silence."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import (
    FAMILIES,
    LAYOUTS,
    MIXED,
    edit_config,
    edit_tensors,
    rename_keys,
    save_layout,
    save_tokenizer,
    tiny_expert,
    tiny_llm,
    tiny_vlm,
)

from drift_peft.checkpoints import warn_of_other_rotations
from drift_peft.prior.build import build_prior
from drift_peft.prior.prior import ReasoningPrior

Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """Folders `vlm` and `expert` of a LLaVA, and Δ between them."""
    vlm = tiny_vlm("llava")
    expert, delta = tiny_expert("llava", vlm)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert")
    return delta


def build(folder, **arguments):
    arguments = {"expert": folder / "expert", "base": folder / "vlm", "output": folder / "p.safetensors"} | arguments
    return build_prior(**arguments, progress=False)


def matrix(weight):
    return weight.U.float() * weight.S @ weight.Vh.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_prior_is_the_known_delta(family, tmp_path):
    vlm = tiny_vlm(family)
    expert, delta = tiny_expert(family, vlm)
    for index, layout in enumerate(LAYOUTS):
        save_layout(vlm, tmp_path / "vlm", layout, "5GB" if index % 2 else "20KB")
        save_layout(expert, tmp_path / "expert", layout, "20KB" if index % 2 else "5GB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rope theta, which has a test of its own
            prior = build(tmp_path, rank=64, overwrite=True)
        assert prior.keys() == delta.keys()
        for name, weight in prior.items():
            assert torch.allclose(matrix(weight), delta[name], atol=1e-2 * delta[name].abs().max())
            assert weight.delta_norm == pytest.approx(float(delta[name].norm()), rel=1e-4)
            assert weight.energy == pytest.approx(1, abs=1e-5) and weight.cosine == pytest.approx(0.995, abs=0.002)
        for folder in ("vlm", "expert"):
            for file in (tmp_path / folder).iterdir():
                file.unlink()


def test_statistics(pair, tmp_path):
    prior = build(tmp_path, rank=12)
    state = tiny_vlm("llava").get_decoder().state_dict()
    for name, weight in prior.items():
        W, delta = state[name], pair[name]
        assert weight.U.shape == (len(W), 12) and weight.S.shape == (12,) and weight.Vh.shape == (12, W.shape[1])
        best = torch.linalg.svdvals(delta).square()
        assert weight.energy == pytest.approx(float(best[:12].sum() / best.sum()), rel=5e-3)
        assert weight.base_norm == pytest.approx(float(W.norm()))
        cosine = torch.cosine_similarity((W + delta).flatten(), W.flatten(), dim=0)
        assert weight.cosine == pytest.approx(float(cosine), abs=1e-5)
        u, v = weight.U.float()[:, :8], weight.Vh.float()[:8]
        assert weight.fingerprint == pytest.approx((u.T @ W @ v.T).diag().tolist(), abs=1e-5)


def test_metadata(pair, tmp_path):
    metadata = build(tmp_path, rank=100, modules=["mlp"], seed=3).metadata
    weights = metadata.pop("weights")
    assert metadata == {
        "format": 1,
        "expert": {"id": str(tmp_path / "expert"), "revision": None},
        "base": {"id": str(tmp_path / "vlm"), "revision": None},
        "reference": None, "rank": 100, "energy": None, "max_rank": None, "dtype": "bfloat16", "seed": 3,
        "modules": ["mlp"], "only_layers": None, "skip_first": 0, "without_counterpart": {}, "not_steered": [],
    }  # fmt: skip
    assert weights.keys() == {name for name in pair if ".mlp." in name}
    assert {tuple(stats["shape"]) for stats in weights.values()} == {(64, 128), (128, 64)}
    assert {stats["rank"] for stats in weights.values()} == {64}  # the ceiling of 100, capped and recorded


def test_same_inputs_same_bytes(pair, tmp_path):
    files = [build(tmp_path, rank=4, output=tmp_path / name).path.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert build(tmp_path, rank=4, seed=1).path.read_bytes() != files[0]


def test_a_weight_does_not_depend_on_the_selection(pair, tmp_path):
    everything, attention = build(tmp_path, rank=4), build(tmp_path, rank=4, modules="attn", output=tmp_path / "attn")
    assert len(attention) == 8
    assert all(torch.equal(everything[name].U, attention[name].U) for name in attention)


def test_bf16_against_fp32_checkpoints(pair, tmp_path):
    vlm = tiny_vlm("llava").bfloat16()
    save_layout(vlm, tmp_path / "vlm")
    prior = build(tmp_path)
    expected = load_file(tmp_path / "expert" / "model.safetensors")[f"model.{Q}"]
    expected = expected - vlm.get_decoder().state_dict()[Q].float()  # subtracted in fp32, not in bf16
    assert prior[Q].delta_norm == pytest.approx(float(expected.norm()), rel=1e-6)


def test_hierarchical_prior_takes_delta_from_the_reference(pair, tmp_path):
    reference = tiny_llm("llava", seed=9)
    state = load_file(tmp_path / "expert" / "model.safetensors")
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(state[name] + 0.01 * torch.randn(parameter.shape))
    save_layout(reference, tmp_path / "reference")
    direct = build(tmp_path)
    prior = build(tmp_path, reference=tmp_path / "reference", output=tmp_path / "h.safetensors")
    expected = state[f"model.{Q}"] - reference.get_decoder().state_dict()[Q]
    assert torch.allclose(matrix(prior[Q]), expected, atol=1e-3)
    assert (prior[Q].base_norm, prior[Q].cosine) == (direct[Q].base_norm, direct[Q].cosine)
    assert prior.metadata["reference"] == {"id": str(tmp_path / "reference"), "revision": None}


def test_a_weight_without_delta_is_not_steered_but_recorded(pair, tmp_path):
    base = load_file(tmp_path / "vlm" / "model.safetensors")
    edit_tensors(tmp_path / "expert", lambda t: t.update({f"model.{Q}": base[f"language_model.model.{Q}"]}))
    prior = build(tmp_path)
    assert Q not in prior and len(prior) == 13 and prior.metadata["not_steered"] == [Q]


def test_weights_that_are_zero_in_both_do_not_trip_the_cosine_guard(pair, tmp_path):
    for side in ("vlm", "expert"):  # as in block expansion, where new blocks start with a zero o_proj and down_proj
        edit_tensors(tmp_path / side, lambda t: next(v for k, v in t.items() if k.endswith(Q)).zero_())
    assert build(tmp_path).metadata["not_steered"] == [Q]


def test_progress_bar_names_the_weights(pair, tmp_path, capsys):
    build_prior(tmp_path / "expert", tmp_path / "vlm", tmp_path / "p.safetensors", rank=2)
    captured = capsys.readouterr()
    assert "14/14" in captured.err and "layers.1.self_attn.v_proj.weight" in captured.err and not captured.out


def test_warns_of_another_rope_theta(pair, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path)
    edit_config(tmp_path / "expert", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with pytest.warns(UserWarning, match=r"rope theta is 500000.0 in the expert and 10000.0 in the base: Δ of q_proj"):
        build(tmp_path, overwrite=True)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("expert", "vlm", "words"),
    [
        (LLAMA3, {}, "rope type is llama3 in the expert and default in the base, .*rope factor is 8.0 in the expert"),
        ({}, YARN, "rope type is default in the expert and yarn in the base"),
        ({**YARN, "factor": 2.0}, YARN, "^rope factor is 2.0 in the expert and 4.0 in the base: Δ of q_proj"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, {}, "rope type is linear in the expert"),
        ({"partial_rotary_factor": 0.5}, {}, "^rope partial rotary factor is 0.5 in the expert and 1.0 in the base: Δ"),
        (
            {"sliding": {"rope_theta": 5e5}, "full": {"rope_theta": 1e4}},
            {},
            "^rope theta is 500000.0 in the expert and",
        ),
        (YARN, {**YARN, "type": "yarn", "mrope_section": [2, 2, 4]}, None),
        ({"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "mrope", "mrope_section": [2, 2, 4]}, None),
        ({}, {"partial_rotary_factor": 1.0}, None),
    ],
)
def test_what_rotates_otherwise(expert, vlm, words):
    """Of the configurations alone."""
    whole = {"rope_type": "default", "rope_theta": 1e4}
    sources = {
        role: SimpleNamespace(text_config=SimpleNamespace(rope_parameters=rope if "sliding" in rope else whole | rope))
        for role, rope in (("expert", expert), ("base", vlm))
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_rotations(sources)
    assert [bool(re.search(words, str(w.message))) for w in caught] == [True] if words else not caught


def missing(folder):
    edit_tensors(folder / "expert", lambda t: [t.pop(f"model.{Q}"), t.pop("model.layers.1.mlp.up_proj.weight")])
    edit_tensors(folder / "vlm", lambda t: t.pop("language_model.model.layers.0.mlp.down_proj.weight"))
    return (
        r"do not match in 3 places: layers.0.mlp.down_proj.weight missing in the base; "
        r"layers.0.self_attn.q_proj.weight missing in the expert; layers.1.mlp.up_proj.weight missing in the expert"
    )


def misshaped(folder):
    edit_tensors(folder / "expert", lambda t: t.update({f"model.{Q}": torch.ones(64, 32)}))
    return rf"{Q} is \[64, 32\] in the expert, \[64, 64\] in the base"


def claimed_twice(folder):
    edit_tensors(folder / "vlm", lambda t: t.update({f"model.language_model.{Q}": torch.ones(64, 64)}))
    return rf"{Q} claimed by .*language_model.*{Q} and .*language_model.*{Q} in the base"


def gone_from_both(folder):
    for side in ("vlm", "expert"):
        rename_keys(folder / side, lambda key: None if Q in key else key)
    return f"{Q} missing in the expert; {Q} missing in the base"


def other_depth(folder):
    save_layout(tiny_llm("llava", num_hidden_layers=3), folder / "expert")
    return "expert .*expert and base .*vlm differ in number of layers 3 and 2$"


def other_width(folder):
    save_layout(tiny_llm("llava", hidden_size=32, intermediate_size=96), folder / "expert")
    return "differ in hidden_size 32 and 64, intermediate_size 96 and 128$"


def other_heads(folder):  # of the same shapes
    edit_config(folder / "expert", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    return "differ in num_attention_heads 8 and 4, num_key_value_heads 4 and 2$"


def unrelated(folder):
    save_layout(tiny_llm("llava", seed=7), folder / "expert")
    return r"layers.0.mlp.down_proj.weight of .*expert has cosine -?0.0\d\d with .*vlm: no common ancestor.*--force"


def of_type(dtype, *scales):
    """One weight of the expert in another dtype, and with scales beside it, but nothing in its config."""

    def change(tensors):
        W = tensors[f"model.{Q}"]
        tensors[f"model.{Q}"] = (W / W.abs().max() * 127).to(dtype)
        tensors.update({f"model.{Q.removesuffix('.weight')}{scale}": W.abs().amax(1) / 127 for scale in scales})

    def spoil(folder):
        edit_tensors(folder / "expert", change)
        wrong = f"is {dtype}" if dtype.itemsize != 2 else f"is scaled by model.{Q.removesuffix('weight')}"
        return rf"^{Q} {wrong}.* in the expert .*expert: name the full-precision one"

    return spoil


EIGHT_BITS = [
    of_type(torch.int8, ".scale"),
    of_type(torch.int8),
    of_type(torch.uint8, ".scales", ".zeros"),
    of_type(torch.int32, ".qscale_weight"),
    of_type(torch.float8_e5m2, ".scale_weight"),
    of_type(torch.bool),
    of_type(torch.float16, ".scale"),  # what was an integer, cast
    of_type(torch.bfloat16, ".scale_weight"),
    of_type(torch.bfloat16, ".qscale_weight", ".zero_point"),
    of_type(torch.float16, ".weight.scales"),
]


@pytest.mark.parametrize(
    "spoil",
    [
        *EIGHT_BITS,
        missing,
        misshaped,
        claimed_twice,
        gone_from_both,
        other_depth,
        other_width,
        other_heads,
        unrelated,
    ],
)
def test_pairs_that_do_not_fit_are_refused(spoil, pair, tmp_path):
    before = sorted(os.listdir(tmp_path))
    message = spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_same_model_twice_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"Δ is zero in all 14 weights: .*vlm and .*vlm are the same model"):
        build(tmp_path, expert=tmp_path / "vlm")


def test_unrelated_models_can_be_forced(pair, tmp_path):
    unrelated(tmp_path)
    assert abs(build(tmp_path, force=True)[Q].cosine) < 0.1


def test_a_reference_must_be_related_too(pair, tmp_path):
    save_layout(tiny_llm("llava", seed=7), tmp_path / "reference")
    with pytest.raises(
        ValueError, match=r"down_proj.weight of .*expert has cosine -?0.0\d\d with that of .*reference: no"
    ):
        build(tmp_path, reference=tmp_path / "reference")
    forced = build(tmp_path, reference=tmp_path / "reference", force=True)
    assert forced[Q].delta_norm > 1.2 * forced[Q].base_norm and forced[Q].cosine > 0.9
    assert "cosines" not in forced.metadata["weights"][Q]


def test_weights_whose_norm_vanishes(pair, tmp_path):
    for side in ("vlm", "expert"):
        edit_tensors(tmp_path / side, lambda tensors: [t.mul_(1e-26) for t in tensors.values()])
    with pytest.raises(ValueError, match=r"of .*expert differs by so little that the norm of Δ vanishes in fp32"):
        build(tmp_path)
    save_layout(tiny_vlm("llava"), tmp_path / "vlm")
    with pytest.raises(ValueError, match=r"has cosine 0.000 with that of .*vlm"):
        build(tmp_path, overwrite=True)


def test_cosine_tells_shifted_layers(pair, tmp_path):
    swap = {"model.layers.0": "model.layers.1", "model.layers.1": "model.layers.0"}
    rename_keys(tmp_path / "expert", lambda key: swap.get(key[:14], key[:14]) + key[14:])
    with pytest.raises(ValueError, match="or shifted layers"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": -3}, "rank must be an integer of at least 1, got -3"),
        ({"rank": 2.5}, "rank must be an integer of at least 1, got 2.5"),
        ({"rank": "8"}, "rank must be an integer of at least 1, got '8'"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"energy": 1.0}, "energy must be a number between 0 and 1, got 1.0"),
        ({"energy": "most"}, "energy must be a number between 0 and 1, got 'most'"),
        ({"energy": 0.9, "rank": 8}, "give rank=8 or energy=0.9, not both: with energy, max_rank is the ceiling"),
        ({"energy": 0.9, "max_rank": 0}, "max_rank must be an integer of at least 1, got 0"),
        ({"max_rank": 8}, "max_rank=8 goes with energy: without it, rank is the ceiling"),
        ({"only_layers": []}, "only_layers is empty: leave it out for all layers"),
        ({"only_layers": [0, -1]}, "only_layers takes whole numbers from 0 on, got -1"),
        ({"only_layers": ["0"]}, "only_layers takes whole numbers from 0 on, got '0'"),
        ({"skip_first": -2}, "skip_first takes whole numbers from 0 on, got -2"),
        ({"modules": ["attention"]}, "modules='attention' is unknown: choose from attn, mlp, norm, bias, head, embed"),
        ({"modules": []}, "modules is empty"),
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
        ({"reference": "vlm"}, "only one of the two builds has a reference"),
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


def test_roles_that_are_exchanged_are_noticed_before_the_first_tensor(pair, tmp_path):
    with pytest.raises(
        ValueError, match=r"vlm is a vision-language model and base .*expert a text model: .* change their"
    ):
        build(tmp_path, expert=tmp_path / "vlm", base=tmp_path / "expert")
    assert not (tmp_path / "p.safetensors").exists()
    assert len(build(tmp_path, expert=tmp_path / "vlm", base=tmp_path / "expert", force=True)) == 14


@pytest.mark.parametrize("family", MIXED)
def test_hybrids_and_mixtures_of_experts(family, tmp_path):
    vlm = tiny_vlm(family)
    expert, delta = tiny_expert(family, vlm)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert", max_shard_size="20KB")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = build(tmp_path)
    assert prior.keys() == delta.keys()
    assert all(torch.allclose(matrix(w), delta[name], atol=1e-2 * delta[name].abs().max()) for name, w in prior.items())
    left = prior.metadata["without_counterpart"]
    said = [str(w.message) for w in caught if "not steered" in str(w.message)]
    assert len(said) == bool(left) == (family not in ("mistral_llava", "gemma4"))
    assert all(f"{pattern} ({count}" in said[0] for pattern, count in left.items())


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


def test_an_adapter_is_an_expert(pair, tmp_path):
    llm = tiny_llm("llava")
    llm.load_state_dict(load_file(tmp_path / "expert" / "model.safetensors"))
    save_layout(llm, tmp_path / "text")
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "text")
    adapted.save_pretrained(tmp_path / "adapter")
    prior = build(tmp_path, expert=tmp_path / "adapter")
    merged = adapted.merge_and_unload().get_decoder().state_dict()
    base = tiny_vlm("llava").get_decoder().state_dict()
    assert len(prior) == 14 and prior.metadata["expert"]["base"]["id"] == str(tmp_path / "text")
    for name in (Q, "layers.1.mlp.up_proj.weight"):
        assert torch.allclose(matrix(prior[name]), merged[name] - base[name], atol=2e-3)


@pytest.mark.parametrize(("side", "value"), [("expert", torch.nan), ("vlm", -torch.inf), ("reference", torch.inf)])
def test_what_is_not_finite_is_named(side, value, pair, tmp_path):
    save_layout(tiny_llm("llava"), tmp_path / "reference")
    key = next(key for key in load_file(tmp_path / side / "model.safetensors") if key.endswith(Q))
    edit_tensors(tmp_path / side, lambda tensors: tensors[key].view(-1)[5].fill_(value))
    with pytest.raises(ValueError, match=rf"^{key} of .*{side} holds NaN or infinite values"):
        build(tmp_path, reference=tmp_path / "reference", force=True)


MEMORY = """
import sys, threading, time
from drift_peft.prior.build import build_prior

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def peak(layers, output):
    highest, done = [anonymous()], threading.Event()
    def watch():
        while not done.wait(0.001):
            highest.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    build_prior(f"expert{layers}", f"vlm{layers}", output, rank=4, modules="mlp", progress=False)
    done.set()
    watcher.join()
    return max(highest)

peak(2, "first")  # with what is allocated once
print(peak(2, "a"), peak(7, "b"))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    for layers in (2, 7):
        model = tiny_llm("llava", **size, head_dim=64, num_hidden_layers=layers)
        save_layout(model, tmp_path / f"vlm{layers}")
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.ones_like(parameter)  # of rank 1, which is decomposed fast
        save_layout(model, tmp_path / f"expert{layers}")
    command, environment = [sys.executable, "-c", MEMORY], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    few, many = map(float, run.stdout.split())
    assert many - few < 20, f"{few} MB with 2 layers, {many} MB with 7, of which each has 9 MB of Δ"
