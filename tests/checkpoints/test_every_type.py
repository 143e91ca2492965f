"""Decoders of every kind, in the layouts that are published: read as transformers reads them, and written back."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from every_type import TYPES, tiny_base, tiny_config, tiny_text_expert
from older import known_type, known_types
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, rename_keys, save_layout
from torch import nn

from drift_peft import DriftConfig, build_prior
from drift_peft.checkpoints import Checkpoint, Decoder, module_kind
from drift_peft.checkpoints.match import match_weights
from drift_peft.checkpoints.standalone import write_model
from drift_peft.tuner.steered import lora_layers

# One of each kind: what is on disk and in memory, and how tokens are mixed
KINDS = (
    "cosmos3_omni",  # other names on disk
    "ernie4_5_vl_moe",  # two stacks of experts
    "gemma4",  # layers that share keys and values, gates of their own inputs
    "glm4v",  # fused gate_up_proj
    "glm4v_moe",  # what PEFT takes for experts
    "inkling_mm_model",  # interleaved on disk
    "kimi_k25",  # latent attention, projections fused on disk
    "lfm2_vl",  # short convolutions
    "llama4",  # a decoder inside the decoder
    "minimax_m3_vl",  # split on disk, fused in memory
    "mistral_large4",  # rotated on disk
    "molmo2",
    "nemotron_h_omni",  # one name for all kinds of layers
    "qwen3_5",  # linear attention
)
README = [family for family in FAMILIES if family != "pixtral"]  # which is a LLaVA


def mixes_tokens(module):
    """What looks at several tokens takes a mask, positions or a cache: said by the signature alone."""
    asked = {"attention_mask", "past_key_values", "cache_params", "position_embeddings", "cu_seq_lens"}
    return bool(asked & {*inspect.signature(module.forward).parameters})


@pytest.mark.parametrize("model_type", known_types(KINDS))
def test_names_say_what_the_modules_do(model_type):
    """attn is what mixes tokens, and mlp what acts on one: asked of the modules, as names could lie."""
    decoder = Decoder(tiny_base(model_type))
    assert decoder.projections
    for name, canonical in decoder.projections.items():
        parts = name.removeprefix(f"{decoder.path}.").split(".")
        above = [decoder.layers.get_submodule(".".join(parts[:end])) for end in range(2, len(parts))]
        assert module_kind(canonical) == ("attn" if any(map(mixes_tokens, above)) else "mlp"), name


@pytest.mark.parametrize("model_type", known_types([*KINDS, *README]))
def test_files_are_read_as_transformers_reads_them(model_type, tmp_path):
    base = tiny_base(model_type)
    expert, delta = tiny_text_expert(base)
    expert.save_pretrained(tmp_path / "expert")
    for layout in (True, False):  # as published, and as in memory
        base.save_pretrained(tmp_path / f"base{layout}", save_original_format=layout)
        checkpoint = Checkpoint(tmp_path / f"base{layout}")
        sources = {"expert": Checkpoint(tmp_path / "expert"), "base": checkpoint}
        assert match_weights(sources, ["attn", "mlp"]).keys.keys() == delta.keys()
        state = base.state_dict()
        tied = {name for name in state if name not in checkpoint.in_memory}
        assert not any(map(delta.__contains__, map(checkpoint.decoder.name, tied)))
        for canonical in delta:
            name = next(name for name in checkpoint.in_memory if checkpoint.decoder.name(name) == canonical)
            key = checkpoint.in_memory[name]
            assert checkpoint.shape(key) == tuple(state[name].shape)
            assert torch.equal(checkpoint.tensor(key), state[name])


WRITTEN = ["inkling_mm_model", "minimax_m3_vl", "mistral_large4", "kimi_k25", "qwen3_5"]


@pytest.mark.parametrize("model_type", known_types(WRITTEN))
def test_what_is_written_is_read_as_what_was_meant(model_type, tmp_path):
    """Tensors that transformers splits, fuses or permutes are put back into the form that the file has."""
    base = tiny_base(model_type)
    base.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    names = [checkpoint.language_model[canonical] for canonical in checkpoint.decoder.projections.values()]
    (tmp_path / "merged").mkdir()
    change = write_model(checkpoint, tmp_path / "merged", names, lambda _, W: iter([2 * W.float()]), progress=False)
    assert change == pytest.approx(1.0)
    merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    doubled = {f"{name}.weight" for name in checkpoint.decoder.projections}
    for name, value in base.state_dict().items():
        assert torch.equal(merged[name], 2 * value if name in doubled else value), name


@known_type("inkling_mm_model")
def test_what_cannot_be_written_back_is_refused(tmp_path, monkeypatch):
    base = tiny_base("inkling_mm_model")
    base.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    name, conversion = next(iter(checkpoint.layout.conversions.items()))
    revert = type(conversion).revert
    monkeypatch.setattr(
        type(conversion), "revert", lambda self, made: {k: v + 1 for k, v in revert(self, made).items()}
    )
    (tmp_path / "merged").mkdir()
    with pytest.raises(
        ValueError, match=r"in a form that it does not write back unchanged: load the model, save it with"
    ):
        write_model(checkpoint, tmp_path / "merged", [name], lambda _, W: iter([W.float()]), progress=False)


# Published files hold more, or less, than the classes have


def test_keys_that_gemma_shares_are_ignored_on_disk(tmp_path):
    """As published, Gemma 4 has k and v in the layers that reuse those of earlier ones; transformers drops them."""
    base = tiny_base("gemma4")
    expert, delta = tiny_text_expert(base)
    for model, folder in ((base, "base"), (expert, "expert")):
        save_layout(model, tmp_path / folder)
    shared = [i for i in range(4) if not any(f"layers.{i}.self_attn.k_proj" in name for name in delta)]
    assert shared == [2, 3]
    own = load_file(tmp_path / "base" / "model.safetensors")
    keys = {re.sub(r"layers\.([01])", lambda m: f"layers.{int(m[1]) + 2}", key): key for key in own if "_attn.k" in key}
    more = {new: own[old].clone() for new, old in keys.items()}
    save_file({**own, **more}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert len(load_file(tmp_path / "base" / "model.safetensors")) > len(own)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior.safetensors", rank=4, progress=False)
    assert prior.keys() == delta.keys()  # a published base with a resaved expert


@pytest.mark.parametrize("model_type", ["qwen3_5", "glm4v", "lfm2_vl"])
def test_a_text_fine_tune_of_the_vlm_itself(model_type, tmp_path):
    """Saved as a VLM or as its text model: Δ is the same."""
    base = tiny_base(model_type)
    expert, delta = tiny_text_expert(base)
    vlm = tiny_base(model_type)
    decoder = Decoder(vlm)
    with torch.no_grad():
        for name, canonical in decoder.projections.items():
            vlm.get_submodule(name).weight += delta[canonical]
    found = []
    save_layout(base, tmp_path / "base")
    for model, folder in ((expert, "text"), (vlm, "vlm")):
        save_layout(model, tmp_path / folder)
        found.append(
            build_prior(tmp_path / folder, tmp_path / "base", tmp_path / f"{folder}.prior", rank=8, progress=False)
        )
    assert found[0].keys() == found[1].keys() == delta.keys()
    for name in delta:
        assert torch.equal(found[0][name].S, found[1][name].S)


def test_norms_biases_layers_and_restart_hold_for_new_names(tmp_path):
    base = tiny_base("lfm2_vl")
    expert, delta = tiny_text_expert(base)
    with torch.no_grad():
        for name, parameter in expert.get_decoder().named_parameters():
            if "norm" in name:
                parameter += 0.1
    save_layout(base, tmp_path / "base")
    save_layout(expert, tmp_path / "expert")
    output = tmp_path / "prior.safetensors"
    modules = ("attn", "mlp", "norm")
    build = {"rank": 8, "progress": False, "modules": modules, "overwrite": True}
    prior = build_prior(tmp_path / "expert", tmp_path / "base", output, **build)
    assert {name for name in prior if module_kind(name) in ("attn", "mlp")} == delta.keys()
    norms = {name for name in prior if module_kind(name) == "norm"}
    assert {"layers.0.operator_norm.weight", "layers.0.ffn_norm.weight", "embedding_norm.weight"} <= norms
    assert all(0.99 < prior.metadata["weights"][name]["cosine"] <= 1.001 for name in delta)
    one = build_prior(tmp_path / "expert", tmp_path / "base", output, **build, only_layers=[0])
    assert {name for name in one if name.startswith("layers.")} == {
        name for name in prior if name.startswith("layers.0.")
    }


def test_a_model_without_a_list_of_layers_is_named(tmp_path):
    base = tiny_base("qwen3_5")
    save_layout(base, tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    checkpoint.model.model.language_model.layers = nn.Identity()
    with pytest.raises(
        ValueError, match=r"base is a Qwen3_5ForConditionalGeneration, which has no decoder whose layers"
    ):
        _ = checkpoint.decoder


@pytest.mark.parametrize("model_type", ["chameleon", "idefics"])
def test_a_tower_beside_the_layers_is_none_of_the_language_model(model_type):
    """Their decoders are modules that hold the tower too."""
    kinds = Decoder(tiny_base(model_type)).kinds
    assert any(re.match("vqmodel|vision_model", name) for name in kinds)
    beside = {name for name, kind in kinds.items() if kind and not name.startswith("layers.")}
    assert beside == {"embed_tokens.weight", "norm.weight", "lm_head.weight"}


def test_a_model_that_has_no_decoder_says_so():
    config = tf.PerceiverConfig(num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1)
    with pytest.raises(ValueError, match="PerceiverModel does not say where its language model is"):
        Decoder(tf.PerceiverModel(config))


@known_type("deepseek_v4")
def test_a_block_diagonal_layer_is_no_projection(tmp_path):
    """DeepSeek V4's o_a_proj is a Linear whose input is a group's, while its rows are those of all groups."""
    base = tf.AutoModelForCausalLM.from_config(tiny_config("deepseek_v4"))
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in base.parameters():
            weight += 0.1 * torch.randn_like(weight)
    base.save_pretrained(tmp_path / "expert")
    with pytest.warns(UserWarning, match=r"layers\.\*\.self_attn\.o_a_proj\.weight \(\d"):
        prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "p.safetensors", rank=2, progress=False)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    layers = lora_layers(get_peft_model(model, DriftConfig(prior=prior.path, r=2)))
    assert {name for name, *_ in layers} == {*prior} and any("o_b_proj" in name for name in prior)


BESIDE = {  # type -> matrices of its language model that no preset names, outside of the layers
    "chameleon": {},
    "gemma3n": {
        "per_layer_model_projection.weight": 1,
        "altup_projections.*.weight": 3,
        "altup_unembed_projections.*.weight": 3,
    },
    "gemma4": {"per_layer_model_projection.weight": 1},
    "idefics": {
        f"gated_cross_attn_layers.*.{name}_proj.weight": 2
        for name in [*(f"cross_attn.{p}" for p in "qkvo"), *(f"mlp.{p}" for p in ("gate", "up", "down"))]
    },
    "qwen2_5_vl": {},
    "qwen4_exp": {f"hyper_connection_mixer.input_mix_weight_{way}.weight": 1 for way in ("down", "up")},
}


@pytest.mark.parametrize("model_type", known_types(BESIDE))
def test_matrices_beside_the_layers_are_said_to_be_left(model_type, tmp_path):
    """Not those of a tower that stands beside the layers, such as Chameleon's and Idefics'."""
    tiny_base(model_type).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    found = match_weights({"expert": checkpoint, "base": checkpoint}, ["attn", "mlp"])
    left = {name: n for name, n in found.without_counterpart.items() if not name.startswith("layers.")}
    assert left == BESIDE[model_type] and not any(found.shares[name] for name in left)


@known_type("hrm_text")
def test_of_two_lists_of_layers_none_is_taken():
    with pytest.raises(ValueError, match="HrmTextForCausalLM does not say where its language model is"):
        Decoder(tf.AutoModelForCausalLM.from_config(tiny_config("hrm_text")))


@known_type("pi0")
def test_an_action_expert_is_no_language_model():
    with pytest.raises(ValueError, match="PI0ForConditionalGeneration does not say where its language model is"):
        Decoder(tiny_base("pi0"))


def test_models_side_by_side_do_not_say_which_one_is_meant():
    vlm = tiny_base("qwen2_5_vl")
    assert Decoder(nn.ModuleDict({"model": vlm})).projections
    with pytest.raises(ValueError, match="ModuleDict does not say where its language model is"):
        Decoder(nn.ModuleDict({"tower": tiny_base("qwen2_5_vl").model.visual, "model": vlm}))


def test_keys_of_other_versions_are_found(tmp_path):
    """A prefix more, which no version of transformers reads: by the names that are left."""
    base = tiny_base("lfm2_vl")
    save_layout(base, tmp_path / "base")
    names = Checkpoint(tmp_path / "base").language_model.keys()
    rename_keys(
        tmp_path / "base", lambda key: key.replace("language_model.layers", "language_model.model.model.layers")
    )
    assert Checkpoint(tmp_path / "base").language_model.keys() == names


@pytest.mark.slow
@known_type(*KINDS)
def test_the_sweep_over_types_goes_the_whole_way():
    script = Path(__file__).parents[2] / "benchmarks" / "families.py"
    types = ["gemma3n", "deepseek_ocr2", "llava"]
    assert {*types, *KINDS} <= {*TYPES}
    done = subprocess.run([sys.executable, script, *types], capture_output=True, text=True, check=True)
    assert '"works": 2, "refused": 1' in done.stdout.splitlines()[-1]
