"""modules_to_save that hold other modules: all that is in PEFT's copy of them is trained, and so it is steered."""

import copy
import re
import warnings

import pytest
import torch
from older import deletes_saved_modules, known, leaves_the_others
from pairs import drift, load, untouched, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from twin import (
    ALPHA,
    assert_copies_guided_like_oracle,
    assert_guided_like_oracle,
    assert_same_update,
    canonical,
    make_whole_pair,
    randomized,
    sgd,
    state,
    steered,
    train,
)

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.tuner.steered import steered_of, trainable_tensors

CONTAINERS = {
    "the MLPs": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "attention": {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
    "a layer": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
    "the whole model": {"target_modules": ["lm_head"], "modules_to_save": ["model"]},
    "the MLPs, and all biases": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"], "bias": "all"},
    "one with a bias": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
}
MLP = CONTAINERS["the MLPs"]
each_container = pytest.mark.parametrize("case", [known(case, settings) for case, settings in CONTAINERS.items()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Its prior has a Δ for every tensor: projections, norms, biases, embedding, head."""
    return make_whole_pair(tmp_path_factory.mktemp("whole"))


def stock(pair, **settings):
    lora = LoraConfig(r=4, lora_alpha=6, **settings)
    return randomized(get_peft_model(copy.deepcopy(pair.base), lora))


def names(model):
    """Canonical names of what is steered, and of what is trained, without LoRA's factors."""
    tensors = [s.name for s in steered_of(model) if s.factors == ("W",)]
    assert len({*tensors}) == len(tensors)
    return {*tensors}, {canonical(name) for name in state(model) if "lora_" not in name}


@each_container
@pytest.mark.parametrize(
    ("scale", "target"),
    [("adaptive", "residual"), ("absolute", "delta"), ("decoupled", "factors"), ("decoupled", "base")],
)
def test_all_that_a_copy_holds_steps_as_the_oracle(whole, scale, target, case):
    model = assert_guided_like_oracle(whole, sgd, scale, target, steps=3, **CONTAINERS[case])
    tensors, trained = names(model)
    assert tensors == trained


@each_container
def test_guide_steers_the_copies_of_a_stock_adapter(whole, case):
    """Toward Δ − (W − W_0), with W_0 the base's, however far the copies have gone."""
    model = stock(whole, **CONTAINERS[case])
    assert_copies_guided_like_oracle(model, whole)
    tensors, trained = names(model)
    assert tensors == trained


@pytest.mark.parametrize(
    ("family", "saved"),
    [("qwen2_5_vl", "language_model"), ("llava_next", "language_model"), ("idefics2", "text_model")],
)
def test_a_saved_language_model_is_steered_under_its_own_names(pairs, family, saved):
    folder = pairs(family)
    settings = {"target_modules": ["lm_head"], "modules_to_save": [saved]}
    with pytest.warns(UserWarning, match="1 targeted modules have no Δ in the prior"):
        ours = wrap(load(folder, family), drift(folder, **settings))
    theirs = get_peft_model(load(folder, family), LoraConfig(r=4, **settings))
    with pytest.warns(UserWarning, match="1 targeted modules have no Δ in the prior"):
        guide(theirs, folder / "prior.safetensors")
    for model in (ours, theirs):
        tensors, trained = names(model)
        assert len(tensors) == 14 and tensors < trained


def test_saved_modules_of_the_vision_tower_are_trained_plainly(pairs):
    folder = pairs("qwen2_5_vl")
    model = wrap(load(folder, "qwen2_5_vl"), drift(folder, **MLP))
    assert any("visual" in name for name in state(model))
    assert names(model)[0] == {f"layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("gate", "up", "down")}


# Several adapters


def two_adapters(whole, config):
    """Both with copies of their own, which are alike."""
    model = get_peft_model(copy.deepcopy(whole.base), config())
    model.add_adapter("second", config())
    return model.double().train()


def ours(whole):
    return lambda: DriftConfig(prior=whole.path, r=4, drift_alpha=ALPHA["adaptive"], **MLP)


def of(model, adapter):
    """What an adapter trains, under the names of the default one."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}
    return {name.replace(f".{adapter}.", ".default."): p for name, p in found.items()}


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_the_copies_of_the_active_adapter_are_steered(whole, adapter):
    model = two_adapters(whole, ours(whole))
    alone = get_peft_model(copy.deepcopy(whole.base), ours(whole)()).double().train()
    alone.load_state_dict(of(model, adapter), strict=False)
    start, (idle,) = state(alone), {"default", "second"} - {adapter}
    model.set_adapter(adapter)
    assert {s.adapter for s in steered_of(model)} == {adapter} and len(steered_of(model)) == 14
    before = of(model, idle)
    train(model, sgd(model), 3)
    train(alone, sgd(alone), 3)
    assert_same_update(of(model, adapter), state(alone), start)
    assert all(torch.equal(p, before[name]) for name, p in of(model, idle).items())


@pytest.mark.parametrize(("adapter", "steered"), [(None, "default"), ("default", "default"), ("second", "second")])
def test_guide_steers_the_copies_of_the_adapter_that_it_is_given(whole, adapter, steered):
    model = two_adapters(whole, lambda: LoraConfig(r=4, **MLP))
    guide(model, whole.prior, adapter)
    model.set_adapter(steered)
    copies = {id(p) for name, p in model.named_parameters() if f"modules_to_save.{steered}." in name}
    found = [s for s in steered_of(model) if s.factors == ("W",)]
    assert len(found) == 12 and {id(s.parameter("W")) for s in found} == copies
    assert {s.adapter for s in found} == {steered}
    model.set_adapter(({"default", "second"} - {steered}).pop())
    assert steered_of(model) == []


def test_an_active_adapter_without_copies_is_told_from_one_with(whole):
    """guide() names each copy after the adapter that it belongs to."""
    model = get_peft_model(copy.deepcopy(whole.base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=4, **MLP))
    model.base_model.set_adapter(["default", "second"])
    guide(model, whole.prior)
    assert {s.adapter for s in steered_of(model) if s.factors == ("W",)} == {"second"}
    model.set_adapter("default")
    assert {s.name for s in steered_of(model)} == {f"layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


@leaves_the_others
def test_what_a_copy_stands_for_is_steered_where_it_is_used(whole):
    """Biases that one adapter trains, in modules that another one copies."""
    model = get_peft_model(copy.deepcopy(whole.base), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    model.add_adapter("second", LoraConfig(r=4, **MLP))
    bias = model.base_model.model.model.layers[0].mlp.original_module.up_proj.bias
    assert bias.requires_grad
    for adapter, found in (("default", [bias]), ("second", [])):
        model.set_adapter(adapter)
        mine = [t for t in trainable_tensors(model) if t.name == "layers.0.mlp.up_proj.bias" and t.owner is None]
        assert [getattr(t.module, t.attribute) for t in mine] == found
    model.set_adapter("default")
    guide(model, whole.prior)
    assert bias in [s.parameter("W") for s in steered_of(model) if s.name == "layers.0.mlp.up_proj.bias"]


def test_a_second_adapter_leaves_the_biases_of_the_first_to_it(whole):
    model = steered(whole, bias="all", target_modules=["q_proj"])
    model.add_adapter("second", ours(whole)())
    assert {s.adapter for s in steered_of(model) if s.name.endswith(".bias")} == {"default"}


@deletes_saved_modules
def test_a_deleted_adapters_copies_are_steered_no_more(whole):
    model = two_adapters(whole, ours(whole))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert {s.adapter for s in steered_of(model)} == {"second"} and len(steered_of(model)) == 14


# What is said of them


def test_patterns_speak_of_what_peft_copies(whole):
    """By the ends of the model's own names: "norm" is every norm, and "model" is no part of a canonical name."""
    pattern = {"layers.1.mlp.up_proj": 0.1}
    model = steered(whole, drift_alpha_pattern=pattern, **MLP)
    alphas = {s.name: s.alpha for s in steered_of(model)}
    assert alphas.pop("layers.1.mlp.up_proj.weight") == 0.1 and {*alphas.values()} == {ALPHA["adaptive"]}
    ends = {"norm": "layers.0.input_layernorm", "p_proj": "layers.0.mlp.up_proj", "layers.1": "layers.1.mlp.up_proj"}
    for saved, name in ends.items():
        settings = {"target_modules": ["q_proj"], "modules_to_save": [saved], "drift_alpha_pattern": {name: 0.1}}
        weak = [s.name for s in steered_of(steered(whole, **settings)) if s.alpha == 0.1]
        assert weak == [f"{name}.weight"]
    steered(whole, drift_alpha_pattern=pattern, **CONTAINERS["the whole model"])
    held = {"scale": "decoupled", "target": "base", "drift_alpha_pattern": pattern}
    steered(whole, **held, **CONTAINERS["the whole model"])


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("mlp.up_proj", {"modules_to_save": ["o_proj"]}),
        ("q_proj.bias", {"modules_to_save": ["o_proj"]}),
        known("mlp.up_proj.bias", {"bias": "lora_only"}, {"bias": "lora_only"}),
    ],
)
def test_patterns_of_what_is_not_trained_are_refused(whole, pattern, settings):
    """Such as the biases that PEFT trains with its layers, of a layer that has no adapter."""
    message = re.escape(f"drift_alpha_pattern names {pattern!r}, but nothing that is steered matches it")
    with pytest.raises(ValueError, match=message):
        steered(whole, target_modules=["q_proj"], drift_alpha_pattern={pattern: 0.1}, **settings)


def test_copies_are_counted_and_measured(whole, capsys):
    model = steered(whole, **MLP)
    model.print_trainable_parameters()
    assert "steered modules: 2 of 2 adapted || steered tensors: 12" in capsys.readouterr().out
    train(model, sgd(model, 0.5), 4)
    seen = telemetry(model)
    assert seen["guided_steps"] == 4 and seen["absorbed/mlp"] > 0 and seen["bias_ratio/mlp"] > 0


def test_training_goes_on_from_the_bases_start(whole, tmp_path):
    settings = {"dtype": torch.float32, **CONTAINERS["a layer"]}
    model = steered(whole, "absolute", "residual", **settings)
    train(model, sgd(model, 0.5), 3)
    model.save_pretrained(tmp_path)
    config = DriftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole.base), tmp_path, config=config, is_trainable=True).train()
    start = state(model)
    for m in (model, loaded):
        train(m, sgd(m, 0.5), 2)
    assert_same_update(loaded, model, start, 1e-4)


def test_guide_compares_the_prior_with_the_base_and_not_with_the_copies(pairs):
    """However far these have gone, nothing is said of another base; and another base is still seen."""
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, **MLP))
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data.mul_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        guide(model, folder / "prior.safetensors")
    other = load(folder, "llama")
    for layer in other.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            projection.weight.data.normal_(std=0.1)
    with pytest.raises(ValueError, match="was built for other base weights"):
        guide(get_peft_model(other, LoraConfig(r=4, **MLP)), folder / "prior.safetensors")


# What PEFT cannot copy


NESTED = {
    "a copy in a copy": ({"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]}, "copy of .*mlp, and"),
    "LoRA in a copy": ({"target_modules": ["q_proj"], "modules_to_save": ["attn"]}, "copy of .*self_attn, and"),
}


@pytest.mark.parametrize(("settings", "message"), NESTED.values(), ids=NESTED)
def test_a_part_of_a_copy_that_is_trained_in_vain_is_refused(pairs, settings, message):
    folder = pairs("llama")
    model = load(folder, "llama")
    with pytest.raises(ValueError, match=f"modules_to_save has PEFT train a {message} .* is copied or adapted as well"):
        get_peft_model(model, drift(folder, **settings))
    assert untouched(model) and not any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    theirs = get_peft_model(model, LoraConfig(r=4, **settings))
    with pytest.raises(ValueError, match=message):
        guide(theirs, folder / "prior.safetensors")
    assert steered_of(theirs) == []


def test_what_is_adapted_and_saved_at_once_is_refused(pairs):
    folder = pairs("llama")
    model = load(folder, "llama")
    with pytest.raises(
        ValueError, match=r"modules_to_save names model\.layers\.0\.self_attn\.q_proj, which LoRA adapts"
    ):
        get_peft_model(model, drift(folder, target_modules=["q_proj"], modules_to_save=["proj"]))
    assert untouched(model)
    model = wrap(model, drift(folder))
    with pytest.raises(ValueError, match=r"copy of model\.layers\.0\.mlp, and model\.layers\.0\.mlp\.down_proj in it"):
        model.add_adapter("second", drift(folder, **MLP))


def test_targets_that_are_all_in_modules_to_save_are_refused(pairs):
    folder = pairs("llama")
    model = load(folder, "llama")
    message = (
        r"names no module of this LlamaForCausalLM outside modules_to_save=\['self_attn'\], where PEFT adapts nothing"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, drift(folder, target_modules=["q_proj"], modules_to_save=["self_attn"]))
    assert untouched(model)


def test_names_of_no_module_to_save_are_refused(pairs):
    folder = pairs("llama")
    model = load(folder, "llama")
    with pytest.raises(ValueError, match="modules_to_save names 'projector', and no module of this LlamaForCausalLM"):
        get_peft_model(model, drift(folder, target_modules=["q_proj"], modules_to_save=["lm_head", "projector"]))
    assert untouched(model)


@pytest.mark.parametrize("saved", ["up_proj", "mlp", "layers.1"])
def test_modules_to_save_in_4_bits_are_refused(pairs, saved):
    folder = pairs("llama")
    model = load(folder, "llama", "nf4")
    message = rf"modules_to_save names model\..*{saved}, but model\..*weight is quantized and cannot be trained itself"
    with pytest.raises(ValueError, match=message):
        wrap(model, drift(folder, target_modules=["q_proj"], modules_to_save=[saved]))
    assert untouched(model)


def test_modules_to_save_in_full_precision_beside_4_bits_are_steered(pairs):
    folder = pairs("llama")
    skipped = ["lm_head", *(f"model.layers.{i}.mlp" for i in (0, 1))]
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    options = {"dtype": torch.float32, "quantization_config": quantized}
    model = wrap(AutoModelForCausalLM.from_pretrained(folder / "base", **options), drift(folder, **MLP))
    tensors, trained = names(model)
    assert len(tensors) == 6 and tensors == trained
