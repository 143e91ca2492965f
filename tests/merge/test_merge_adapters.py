"""merge_adapter with every kind of LoRA adapter: the folder is what PEFT's own merge in memory makes of the base."""

import json
import math
import shutil
import warnings

import pytest
import torch
from merging import IDS, edit_config, edit_weights, load, logits, merge
from older import known, ties_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TEXT as TEXT_MODEL
from tiny import edit_tensors, gemma4, rename_keys, save_layout, tiny_llm, tiny_vlm
from transformers import (
    Gemma4ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from drift_peft import language_model_targets
from drift_peft.checkpoints.lora import open_expert

BIASED = {"attention_bias": True, "mlp_bias": True}
TEXT = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 1}, "use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"q_proj": 2}},
    "biases of the adapted layers": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
    "an adapter with a bias": {"lora_bias": True},
    "head and norms saved": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "MLPs saved": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "a layer saved, with its norms and biases": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
    "the model saved, and its head adapted": {"target_modules": ["lm_head"], "modules_to_save": ["model"]},
    "tokens": {"trainable_token_indices": [3, 60]},
    "tokens of embedding and head": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [9, 4, 63]}},
    "embedding and head adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "dora, saved and biases": {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]},
}
VISION = {
    "qwen2_5_vl": {"target_modules": ["q_proj", "qkv", "gate_proj"]},
    "llava_next": {"target_modules": r".*(vision_tower|language_model).*(q_proj|fc1)", "modules_to_save": ["linear_1"]},
    "idefics2": {"target_modules": ["q_proj", "out_proj"]},
    "gemma3": {"target_modules": ["q_proj", "fc2"], "use_dora": True},
    "qwen3_vl": {"target_modules": ["q_proj", "linear_fc1"], "bias": "lora_only"},
}


def trained(folder, model, **settings):
    """A stock adapter with all that it trains moved. Returns the wrapped model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            factor = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * factor + 0.05 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


def assert_same_model(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [known(case, settings) for case, settings in TEXT.items()])
def test_adapters_of_a_text_model(tmp_path, case):
    def model():
        return tiny_llm("llava", **BIASED)

    save_layout(model(), tmp_path / "base", max_shard_size="20KB")
    settings = {"target_modules": language_model_targets(model()), **TEXT[case]}
    expected = trained(tmp_path / "adapter", model(), **settings)
    report = merge(tmp_path, verify=True)
    assert_same_model(load(tmp_path / "merged"), expected.merge_and_unload())
    assert report.logits_error < 1e-5 and report.modules > 0


@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("family", [known(family, settings) for family, settings in VISION.items()])
def test_adapters_on_the_vision_tower(tmp_path, family, layout):
    save_layout(tiny_vlm(family), tmp_path / "base", layout)
    expected = trained(tmp_path / "adapter", tiny_vlm(family), **VISION[family])
    merge(tmp_path)
    assert_same_model(load(tmp_path / "merged", family), expected.merge_and_unload())


def test_biases_that_were_not_saved_are_missed(tmp_path):
    """PEFT before 0.21 trains them with bias="lora_only", and saves none."""
    save_layout(tiny_llm("llava", **BIASED), tmp_path / "base")
    trained(tmp_path / "adapter", tiny_llm("llava", **BIASED), bias="lora_only", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.endswith("bias")}, file)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.bias, since PEFT before 0\.21"):
        merge(tmp_path)
    shutil.rmtree(tmp_path / "base")
    save_layout(tiny_llm("llava"), tmp_path / "base")  # which has none that could have been trained
    assert merge(tmp_path).modules == 2


@pytest.mark.parametrize("target", ["c_proj", "c_attn"])  # square, and not
def test_transposed_weights(tmp_path, target):
    """GPT-2's Conv1D layers keep W [in, out], and their adapters B·A [out, in]."""

    def model():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=8)
        return GPT2LMHeadModel(config).eval()

    model().save_pretrained(tmp_path / "base")
    expected = trained(tmp_path / "adapter", model(), target_modules=[target])
    merge(tmp_path)
    assert_same_model(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), expected.merge_and_unload())
    trained(tmp_path / "adapter", model(), target_modules=[target], use_dora=True)
    with pytest.raises(ValueError, match=r"uses DoRA on the transposed weight of .*c_"):
        merge(tmp_path, overwrite=True)


def test_transposed_weights_beside_others(tmp_path):
    """PEFT writes fan_in_fan_out=False for both kinds together, and asks each layer which it is."""

    def model():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 8}
        return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()

    model().save_pretrained(tmp_path / "base")
    expected = trained(tmp_path / "adapter", model(), target_modules=["c_proj", "lm_head"])
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    merge(tmp_path)
    assert_same_model(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), expected.merge_and_unload())


def test_saved_numbers_without_bounds(tmp_path):
    """Gemma 4 has bounds of a layer's values in single numbers, which are infinite where nothing is clipped."""

    def model():
        config = gemma4()
        config.vision_config.use_clipped_linears = True
        torch.manual_seed(0)
        found = Gemma4ForConditionalGeneration(config).eval()
        bounds = [value for value in found.state_dict().values() if value.dim() == 0]
        for value in bounds[::2]:
            value.fill_(7.0)
        assert sum(value.isinf().item() for value in bounds) == len(bounds) // 2 > 0
        return found

    save_layout(model(), tmp_path / "base")
    own = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["encoder.layers.0.self_attn.q_proj"]}
    expected = trained(tmp_path / "adapter", model(), **own)
    assert merge(tmp_path).relative_change > 0.01
    assert_same_model(load(tmp_path / "merged", "gemma4"), expected.merge_and_unload())
    weight = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"
    edit_weights(tmp_path / "adapter", lambda t: t[weight].fill_(math.inf))
    with pytest.raises(ValueError, match=r"holds NaN or infinity in .*q_proj\.linear\.weight: its training diverged"):
        merge(tmp_path, overwrite=True)


def test_single_experts_of_a_stack(tmp_path):
    """transformers 4 had a module for each, under the name that the files still have."""
    torch.manual_seed(0)
    config = MixtralConfig(**TEXT_MODEL, num_local_experts=2, num_experts_per_tok=1)
    save_layout(MixtralForCausalLM(config), tmp_path / "base")
    trained(tmp_path / "adapter", MixtralForCausalLM(config), target_modules=["q_proj"])
    expert = "model.layers.1.block_sparse_moe.experts.1.w1"
    W = load_file(tmp_path / "base" / "model.safetensors")[f"{expert}.weight"]
    A, B = torch.randn(4, W.shape[1]), torch.randn(W.shape[0], 4)
    factors = {f"base_model.model.{expert}.lora_{name}.weight": value for name, value in (("A", A), ("B", B))}
    edit_weights(tmp_path / "adapter", lambda t: t.update(factors))
    edit_config(tmp_path / "adapter", "adapter_config.json", target_modules=["q_proj", "w1"])
    merge(tmp_path)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(merged.pop(f"{expert}.weight"), W + 2 * B @ A)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert all("q_proj" in key or torch.equal(value, base[key]) for key, value in merged.items())


def test_both_ends_of_a_tied_weight_saved_apart(tmp_path):
    save_layout(tiny_llm("llava", tie_word_embeddings=True), tmp_path / "base")
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    expected = trained(tmp_path / "adapter", load(tmp_path / "base"), **saved).eval()
    with pytest.raises(ValueError, match=r"to keep both, merge it in memory .*config\.tie_word_embeddings=False$"):
        merge(tmp_path)
    kept = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    kept.config.tie_word_embeddings = False
    kept.save_pretrained(tmp_path / "kept")
    torch.testing.assert_close(logits(load(tmp_path / "kept")), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", ["as the embedding", "twice", "as the head"])
def test_tokens_of_a_tied_head(tmp_path, stored):
    model = tiny_llm("llava", tie_word_embeddings=True)
    save_layout(model, tmp_path / "base")
    if stored != "as the embedding":
        edit_tensors(tmp_path / "base", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    if stored == "as the head":
        edit_tensors(tmp_path / "base", lambda t: t.pop("model.embed_tokens.weight"))
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}
    expected = trained(tmp_path / "adapter", model, **settings)
    merge(tmp_path)
    assert_same_model(load(tmp_path / "merged"), expected.merge_and_unload())


TIED = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("stored_twice", [False, True])
@pytest.mark.parametrize("case", [pytest.param(case, marks=ties_weights if case != "saved" else ()) for case in TIED])
def test_a_tied_weight_that_is_trained_as_one(tmp_path, case, stored_twice):
    """PEFT's ensure_weight_tying keeps both ends alike, and writes both."""
    save_layout(tiny_llm("llava", tie_word_embeddings=True), tmp_path / "base")
    if stored_twice:
        edit_tensors(tmp_path / "base", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    wrapped = get_peft_model(load(tmp_path / "base"), LoraConfig(r=4, ensure_weight_tying=True, **TIED[case]))
    for parameter in {id(p): p for p in wrapped.parameters() if p.requires_grad}.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=IDS).logits for m in (load(tmp_path / "merged"), wrapped))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_only_the_configuration_ties(tmp_path):
    """transformers does not tie what the files hold apart."""
    save_layout(tiny_llm("llava"), tmp_path / "base")
    edit_config(tmp_path / "base", "config.json", tie_word_embeddings=True)
    expected = trained(tmp_path / "adapter", load(tmp_path / "base"), target_modules=["q_proj", "lm_head"])
    merge(tmp_path)
    assert_same_model(load(tmp_path / "merged"), expected.merge_and_unload())


OLDER = {  # what a version of transformers called it -> what the next one did
    "qwen2_5_vl": ("model.visual.", "visual."),
    "llava_next": ("model.vision_tower.", "vision_tower."),
    "gemma3": ("model.vision_tower.", "vision_tower."),
    "idefics2": ("model.", "module.model._orig_mod."),
    "llava": ("model.multi_modal_projector.", "multi_modal_projector."),
    "internvl": ("model.vision_tower.", "model._orig_mod.vision_tower."),
}


@pytest.mark.parametrize("family", OLDER)
def test_adapters_of_the_vision_side_under_other_names(tmp_path, family):
    new, old = OLDER[family]
    save_layout(tiny_vlm(family), tmp_path / "base")
    settings = VISION.get(family, {"target_modules": ["q_proj", "linear_1"]})
    expected = trained(tmp_path / "adapter", tiny_vlm(family), **settings)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rename_keys(tmp_path / "adapter", lambda key: key.replace(f"base_model.model.{new}", f"base_model.model.{old}"))
    assert before.keys() != load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    merge(tmp_path)
    assert_same_model(load(tmp_path / "merged", family), expected.merge_and_unload())


def test_an_expert_that_is_any_adapter(tmp_path):
    save_layout(tiny_llm("llava"), tmp_path / "base")
    model = tiny_llm("llava")
    model.name_or_path = str(tmp_path / "base")
    expected = trained(tmp_path / "adapter", model, target_modules=["q_proj"], use_dora=True)
    expert, expected = open_expert(tmp_path / "adapter"), expected.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        torch.testing.assert_close(expert.tensor(name), expected[name])


def tied(**settings):
    def change(p):
        save_layout(tiny_llm("llava", tie_word_embeddings=True), p / "base")
        trained(p / "adapter", tiny_llm("llava"), **{"target_modules": ["q_proj"], **settings})

    return change


def text(edit=None, **settings):
    def change(p):
        save_layout(tiny_llm("llava"), p / "base")
        trained(p / "adapter", tiny_llm("llava"), **{"target_modules": ["q_proj"], **settings})
        if edit is not None:
            edit_weights(p / "adapter", edit)

    return change


def rows_beyond(p):
    text(trainable_token_indices=[3])(p)
    config = p / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": [64]}))


def convolution(p):
    save_layout(tiny_vlm("qwen2_5_vl"), p / "base")
    trained(p / "adapter", tiny_vlm("qwen2_vl"), target_modules=["q_proj", "patch_embed.proj"])


REFUSED = {
    "tied head": (tied(target_modules=["lm_head"]), "lm_head shares its weight with the embedding, and only one"),
    "tied embedding": (tied(target_modules=["embed_tokens"]), "embed_tokens shares its weight with the head, and"),
    "tied head saved": (tied(modules_to_save=["lm_head"]), "lm_head shares its weight with the embedding, and"),
    "both ends of a tied weight": (
        tied(target_modules=["embed_tokens", "lm_head"]),
        "and .* are the same weight embed_tokens.weight; ensure_weight_tying=True of PEFT 0.19 or newer .* as one$",
    ),
    "dora on an embedding": (
        text(target_modules=["embed_tokens"], use_dora=True),
        "uses DoRA on the embedding model.embed_tokens; merge it in memory",
    ),
    "a bias that the base lacks": (text(lora_bias=True), r"the base has no layers\.0\.self_attn\.q_proj\.bias"),
    "rows beyond the vocabulary": (rows_beyond, r"embed_tokens.weight is \[64, 64\] in the base and \[65, 64\] in the"),
    "a convolution": (convolution, "adapts model.visual.patch_embed.proj, which is a convolution; merge it in memory"),
    "foreign tensor": (
        text(edit=lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)})),
        "holds base_model.model.model.norm.weight, which is no part of LoRA",
    ),
    "half of dora": (
        text(edit=lambda t: [t.pop(key) for key in list(t) if "lora_A" in key or "lora_B" in key], use_dora=True),
        "holds only lora_magnitude_vector of .*, without lora_A.weight: save the adapter again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    prepare, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter"}
