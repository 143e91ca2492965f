"""naming.py: one canonical name whatever wrote or wraps a weight, and targets that hit the language model alone."""

import re

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import FAMILIES, SELF_LAYERS, tiny_llm, tiny_vlm

from drift_peft.checkpoints import language_model_targets
from drift_peft.checkpoints.naming import (
    PROJECTIONS,
    canonical_name,
    cross_attention_layers,
    layer_order,
    module_kind,
    pattern_matches,
)

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PREFIXES = (
    "", "model.", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
    "text_model.", "model.model.", "language_model.model.model.", "model.language_model.model.model.",
    "thinker.model.",
)  # fmt: skip
CANONICAL = (
    "layers.11.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight", "layers.3.self_attn.k_proj.bias",
    "layers.1.input_layernorm.weight", "embed_tokens.weight", "norm.weight", "lm_head.weight",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", ["", "base_model.model.", "module.", "_orig_mod.module.base_model.model."])
def test_every_layout_and_wrapper_gives_the_same_name(prefix, wrapper):
    assert [canonical_name(wrapper + prefix + name) for name in CANONICAL] == list(CANONICAL)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.modules_to_save.default.q_proj.weight",
        "base_model.model.model.original_module.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._orig_mod.self_attn.q_proj.weight",
    ],
)
def test_wrappers_inside_the_name(name):
    assert canonical_name(name) == "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.0.mlp.gate_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.transformer.layers.0.attention.q_proj.weight",
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_model.transformer.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "model.connector.modality_projection.gate_proj.weight",
        "model.connector.perceiver_resampler.layers.0.self_attn.q_proj.weight",
        "model.perceiver_resampler.norm.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.mtp.layers.0.mlp.up_proj.weight",
        "mtp.norm.weight",
        "talker.model.layers.0.self_attn.q_proj.weight",
        "image_newline",
    ],
)
def test_everything_else_is_not_the_language_model(name):
    assert canonical_name(name) is None


def test_cross_attention_layers_are_skipped_and_the_rest_counted_as_the_text_model_does():
    cross = (3, 8)
    found = [canonical_name(f"language_model.model.layers.{i}.mlp.up_proj.weight", cross) for i in range(10)]
    assert [name and layer_order(name)[1] for name in found] == [0, 1, 2, None, 3, 4, 5, 6, None, 7]


@given(st.sampled_from(PREFIXES), st.integers(0, 99), st.sampled_from(sorted(SEVEN)), st.sets(st.integers(0, 99)))
def test_canonical_name_is_a_fixed_point(prefix, index, projection, cross):
    name = canonical_name(f"{prefix}layers.{index}.self_attn.{projection}.weight", sorted(cross))
    assert (name is None) == (index in cross)
    assert name is None or canonical_name(name) == name


def test_module_kinds():
    kinds = {
        "layers.0.self_attn.o_proj.weight": "attn",
        "layers.10.mlp.gate_proj.weight": "mlp",
        "layers.0.self_attn.q_proj.bias": "bias",
        "norm.bias": "bias",
        "vision_model.encoder.layers.0.mlp.fc1.bias": None,
        "layers.0.self_attn.q_norm.weight": "norm",
        "layers.0.post_attention_layernorm.weight": "norm",
        "norm.weight": "norm",
        "lm_head.weight": "head",
        "embed_tokens.weight": "embed",
        "layers.0.mlp.experts.gate_up_proj": None,
        "layers.0.self_attn.q_proj.lora_A.default.weight": None,
        "layers.0.cross_attn.q_proj.weight": None,
        "layers.0.mixer.in_proj.weight": "attn",
        "layers.0.mixer.up_proj.weight": "mlp",  # of a layer without a mixer of tokens, under the same name
        "layers.0.mixer.shared_experts.down_proj.weight": "mlp",
        "layers.0.conv.in_proj.weight": "attn",
        "layers.0.block.weight": "mlp",
        "layers.0.weight": None,
        "layers.0.norm.weight": "norm",
        "layers.0.norm.scale.weight": "mlp",  # what the module itself is called counts
        "layers.0.self_attn.sinks": None,
        "layers.0.self_attn.gate.bias": None,
        "norm.inner.weight": None,
        "lm_head.bias": "bias",
        "lm_head.inner.weight": None,
        "embed_tokens.bias": "bias",
        "rotary.weight": None,
    }
    assert {name: module_kind(name) for name in kinds} == kinds
    assert {name for name in kinds if module_kind(name) in PROJECTIONS} == {
        n for n, k in kinds.items() if k in ("attn", "mlp")
    }


def test_layer_order_counts():
    assert sorted(["layers.10.a", "layers.2.b", "norm.weight", "layers.2.a"], key=layer_order) == [
        "layers.2.a", "layers.2.b", "layers.10.a", "norm.weight",
    ]  # fmt: skip
    experts = ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.0.up_proj.weight", "layers.0.mlp.gate.weight"]
    assert sorted(experts, key=layer_order)[0] == "layers.0.mlp.gate.weight"  # both ways of naming experts compare


def projections(model, family):
    """Names of the language model's projections, found through the decoder itself."""
    layers = SELF_LAYERS.get(family, [0, 1])
    inside = {id(m) for index in layers for m in model.get_decoder().layers[index].modules()}
    return {n for n, m in model.named_modules() if id(m) in inside and n.split(".")[-1] in SEVEN}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_hit_exactly_the_language_model(family):
    vlm = tiny_vlm(family)
    expected = projections(vlm, family)
    targets = language_model_targets(vlm)
    assert len(expected) == 14
    assert {name for name, _ in vlm.named_modules() if re.fullmatch(targets, name)} == expected

    wrapped = get_peft_model(vlm, LoraConfig(target_modules=targets))
    base = wrapped.get_base_model()
    assert {name for name, module in base.named_modules() if isinstance(module, LoraLayer)} == expected
    assert language_model_targets(wrapped) == targets


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_on_the_text_model_and_its_base_class(family):
    for model in (llm := tiny_llm(family), llm.get_decoder()):
        targets = language_model_targets(model)
        hit = {name for name, _ in model.named_modules() if re.fullmatch(targets, name)}
        assert len(hit) == 14 and all(name.split(".")[-1] in SEVEN for name in hit)


def test_targets_keep_only_the_names_given():
    vlm = tiny_vlm("mllama")  # its layers 0 and 2 are the text model's 0 and 1
    targets = language_model_targets(vlm, ["layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"])
    assert {name for name, _ in vlm.named_modules() if re.fullmatch(targets, name)} == {
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.2.mlp.up_proj",
    }


def test_targets_that_hit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no attention or MLP projection .* among the 1 names"):
        language_model_targets(tiny_llm("llava"), ["layers.7.mlp.up_proj.weight"])


def test_patterns_match_a_name_or_its_end():
    name = "layers.1.self_attn.q_proj"
    assert all(
        pattern_matches(pattern, name) for pattern in ("q_proj", r"layers\..*proj", "self_attn.q_proj", "x|q_proj")
    )
    assert not any(pattern_matches(pattern, name) for pattern in ("_proj", "q_pro", "layers", "Q_PROJ", ""))
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: "):
        pattern_matches("(", name)


def test_cross_attention_layers_of_configs():
    text = FAMILIES["mllama"][0]().text_config
    assert cross_attention_layers(text) == (1, 3)  # of a text model alone
    assert {family: cross_attention_layers(FAMILIES[family][0]()) for family in ("llava", "qwen2_vl", "mllama")} == {
        "llava": (), "qwen2_vl": (), "mllama": (1, 3),
    }  # fmt: skip


def test_targets_do_not_depend_on_the_kind_of_linear_layer():
    model = tiny_llm("llava")
    plain = language_model_targets(model)
    model.model.layers[0].self_attn.q_proj = bnb.nn.Linear4bit(64, 64)
    model.model.layers[1].self_attn.o_proj = bnb.nn.Linear8bitLt(64, 64)
    assert language_model_targets(model) == plain


def test_model_without_a_decoder():
    with pytest.raises(ValueError, match="Linear does not say where its language model is: pass target_modules"):
        language_model_targets(torch.nn.Linear(2, 2))
