"""build.py: the prior is the known Δ for every family, and nothing matches in silence."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LAYOUTS, rename_keys, save_layout, tiny_expert, tiny_llm, tiny_vlm

from drift_peft.build import build_prior
from drift_peft.prior import ReasoningPrior

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


def edit(folder, change):
    """Apply change(tensors) to the only shard of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
        "reference": None, "rank": 100, "dtype": "bfloat16", "seed": 3, "modules": ["mlp"], "not_steered": [],
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
    edit(tmp_path / "expert", lambda t: t.update({f"model.{Q}": base[f"language_model.model.{Q}"]}))
    prior = build(tmp_path)
    assert Q not in prior and len(prior) == 13 and prior.metadata["not_steered"] == [Q]


def test_weights_that_are_zero_in_both_do_not_trip_the_cosine_guard(pair, tmp_path):
    for side in ("vlm", "expert"):  # as in block expansion, where new blocks start with a zero o_proj and down_proj
        edit(tmp_path / side, lambda t: next(v for k, v in t.items() if k.endswith(Q)).zero_())
    assert build(tmp_path).metadata["not_steered"] == [Q]


def test_progress_bar_names_the_weights(pair, tmp_path, capsys):
    build_prior(tmp_path / "expert", tmp_path / "vlm", tmp_path / "p.safetensors", rank=2)
    captured = capsys.readouterr()
    assert "14/14" in captured.err and "layers.1.self_attn.v_proj.weight" in captured.err and not captured.out


def config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_warns_of_another_rope_theta(pair, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path)
    config(tmp_path / "expert", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with pytest.warns(UserWarning, match=r"rope theta is 500000.0 in the expert and 10000.0 in the base: Δ of q_proj"):
        build(tmp_path, overwrite=True)


def missing(folder):
    edit(folder / "expert", lambda t: [t.pop(f"model.{Q}"), t.pop("model.layers.1.mlp.up_proj.weight")])
    edit(folder / "vlm", lambda t: t.pop("language_model.model.layers.0.mlp.down_proj.weight"))
    return (
        r"do not match in 3 places: layers.0.mlp.down_proj.weight missing in the base; "
        r"layers.0.self_attn.q_proj.weight missing in the expert; layers.1.mlp.up_proj.weight missing in the expert"
    )


def misshaped(folder):
    edit(folder / "expert", lambda t: t.update({f"model.{Q}": torch.ones(64, 32)}))
    return rf"{Q} is \[64, 32\] in the expert, \[64, 64\] in the base"


def claimed_twice(folder):
    edit(folder / "vlm", lambda t: t.update({f"model.language_model.{Q}": torch.ones(64, 64)}))
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
    config(folder / "expert", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    return "differ in num_attention_heads 8 and 4, num_key_value_heads 4 and 2$"


def nan(folder):
    edit(folder / "expert", lambda t: t[f"model.{Q}"].view(-1)[5].fill_(torch.nan))
    return f"model.{Q} of .*expert holds NaN or infinite values"


def infinite(folder):
    edit(folder / "vlm", lambda t: t[f"language_model.model.{Q}"].view(-1)[5].fill_(-torch.inf))
    return f"language_model.model.{Q} of .*vlm holds NaN or infinite values"


def unrelated(folder):
    save_layout(tiny_llm("llava", seed=7), folder / "expert")
    return r"layers.0.mlp.down_proj.weight of .*expert has cosine -?0.0\d\d with .*vlm: no common ancestor.*--force"


@pytest.mark.parametrize(
    "spoil",
    [
        missing,
        misshaped,
        claimed_twice,
        gone_from_both,
        other_depth,
        other_width,
        other_heads,
        nan,
        infinite,
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
        ({"modules": ["attn", "norm"]}, "modules='norm' is not available yet: choose from attn, mlp"),
        ({"modules": ["attention"]}, "modules='attention' is unknown: choose from attn, mlp"),
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


def test_full_disk_leaves_nothing(pair, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # each weight fits, the whole prior does not
    try:
        with pytest.raises(OSError, match=r"could not be written: .*File too large"):
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == before
