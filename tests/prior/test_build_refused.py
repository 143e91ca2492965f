"""build.py: nothing matches in silence, neither other weights nor other rotations."""

import os
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from known_delta import Q, build
from safetensors.torch import load_file
from tiny import edit_config, edit_tensors, rename_keys, save_layout, tiny_llm, tiny_vlm

from drift_peft.checkpoints import warn_of_other_rotations


def test_weights_that_are_zero_in_both_do_not_trip_the_cosine_guard(pair, tmp_path):
    for side in ("vlm", "expert"):  # as in block expansion, where new blocks start with a zero o_proj and down_proj
        edit_tensors(tmp_path / side, lambda t: next(v for k, v in t.items() if k.endswith(Q)).zero_())
    assert build(tmp_path).metadata["not_steered"] == [Q]


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
    return "expert .*expert and base .*vlm differ in hidden_size 32 and 64$"


def other_mlp(folder):
    save_layout(tiny_llm("llava", intermediate_size=96), folder / "expert")
    return r"do not match in 6 places: layers.0.mlp.\S+ is .*96.* in the expert, .*128.* in the base"


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
    with pytest.raises(
        ValueError, match=r"Δ is zero in all 14 weights that were asked for: .*vlm and .*vlm are the same there"
    ):
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


def test_roles_that_are_exchanged_are_noticed_before_the_first_tensor(pair, tmp_path):
    with pytest.raises(
        ValueError, match=r"vlm is a vision-language model and base .*expert a text model: .* change their"
    ):
        build(tmp_path, expert=tmp_path / "vlm", base=tmp_path / "expert")
    assert not (tmp_path / "p.safetensors").exists()
    assert len(build(tmp_path, expert=tmp_path / "vlm", base=tmp_path / "expert", force=True)) == 14


@pytest.mark.parametrize(("side", "value"), [("expert", torch.nan), ("vlm", -torch.inf), ("reference", torch.inf)])
def test_what_is_not_finite_is_named(side, value, pair, tmp_path):
    save_layout(tiny_llm("llava"), tmp_path / "reference")
    key = next(key for key in load_file(tmp_path / side / "model.safetensors") if key.endswith(Q))
    edit_tensors(tmp_path / side, lambda tensors: tensors[key].view(-1)[5].fill_(value))
    with pytest.raises(ValueError, match=rf"^{key} of .*{side} holds NaN or infinite values"):
        build(tmp_path, reference=tmp_path / "reference", force=True)
