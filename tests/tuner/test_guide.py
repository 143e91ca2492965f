"""guide(model, prior): models that somebody else wrapped."""

import copy
import warnings

import pytest
import torch
from older import known, variant
from pairs import drift, load, train, wrap
from peft import AdaLoraConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.nn import DataParallel

from drift_peft import ReasoningPrior, build_prior, guide
from drift_peft.tuner.steered import all_steered, steered_of


def test_guide_equals_drift_config(pairs):
    folder = pairs("llama")
    steered = wrap(load(folder, "llama"), drift(folder, drift_alpha=0.3))  # the default of both
    plain = get_peft_model(
        load(folder, "llama"),
        LoraConfig(r=4, lora_alpha=8, target_modules=steered.peft_config["default"].target_modules),
    )
    plain.load_state_dict(steered.state_dict())
    assert guide(plain, str(folder / "prior.safetensors")) is plain
    train(steered), train(plain)
    want = {n: p for n, p in steered.named_parameters() if p.requires_grad}
    got = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


@pytest.mark.parametrize("wrapper", [DataParallel, torch.compile])
def test_what_is_wrapped_once_more_is_looked_into(pairs, wrapper):
    folder = pairs("llama")
    model = wrap(load(folder, "llama"), drift(folder, drift_alpha=0.1))
    with pytest.raises(ValueError, match=r"is steered by its DriftConfig already: change the settings there"):
        guide(wrapper(model), folder / "prior.safetensors", drift_alpha=0.7)
    assert {s.alpha for s in steered_of(model)} == {0.1}
    plain = wrapper(get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"])))
    assert guide(plain, folder / "prior.safetensors", drift_alpha=0.7) is plain
    assert {s.alpha for s in steered_of(plain)} == {0.7}


def test_guide_reports_what_it_does_not_steer(pairs):
    folder = pairs("llava_next")
    model = get_peft_model(load(folder, "llava_next"), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="targeted modules have no Δ in the prior"):
        guide(model, ReasoningPrior.load(folder / "prior.safetensors"))


def test_guide_again_replaces_the_settings(pairs):
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    guide(model, prior, drift_alpha=0.5)
    guide(model, prior, drift_alpha=0.0)
    plain = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    plain.load_state_dict(model.state_dict())
    train(model), train(plain)
    pairs_of = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of)


def test_guide_again_steers_no_more_what_the_new_settings_leave_out(pairs):
    folder = pairs("qwen2_5_vl")
    settings = {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}
    model = get_peft_model(load(folder, "qwen2_5_vl"), LoraConfig(r=4, **settings))
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    guide(model, prior, drift_alpha=0.5)
    assert {s.alpha for s in steered_of(model)} == {0.5} and any("down_proj" in s.name for s in steered_of(model))
    guide(model, prior, drift_alpha=0.1, drift_modules="attn")
    assert {s.alpha for s in steered_of(model)} == {0.1} and not any("down_proj" in s.name for s in steered_of(model))


def test_guide_of_one_adapter_leaves_another_ones_alone(pairs):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj"]))
    own = next(module for name, module in model.named_modules() if name.endswith("up_proj"))
    own.weight.requires_grad_(True)
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    guide(model, prior, "default")
    guide(model, prior, "b", drift_modules=["attn"])
    assert {s.adapter for s in all_steered(model)} == {"default", "b"}
    assert [s.adapter for s in all_steered(model) if "up_proj" in s.name] == ["default"]


def test_what_guide_refuses_leaves_the_earlier_settings(pairs):
    folder = pairs("llama")
    config = LoraConfig(r=4, target_modules=["down_proj"], target_parameters=["self_attn.q_proj.weight"])
    model = get_peft_model(load(folder, "llama"), config)
    guide(model, ReasoningPrior.load(folder / "prior.safetensors"), drift_alpha=0.5)
    before = steered_of(model)
    with pytest.raises(
        ValueError, match=r"drift_norm='weight' is not available .* such as layers\.\d\.self_attn.q_proj"
    ):
        guide(model, ReasoningPrior.load(folder / "prior.safetensors"), drift_alpha=0.1, drift_norm="weight")
    assert steered_of(model) == before and {s.alpha for s in before} == {0.5}


def test_guide_before_the_model_is_wrapped(pairs):
    """Its own weights are steered then, which PEFT freezes."""
    folder = pairs("llama")
    model = guide(load(folder, "llama"), folder / "prior.safetensors")
    with pytest.warns(
        UserWarning, match=r"steered 14 of .* adapter 'default' is not steered: call guide\(model, prior\)"
    ):
        plain = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert steered_of(plain) == []
    assert len(steered_of(plain.unload().requires_grad_(True))) == 14  # as before, once the adapter is gone
    model = guide(load(folder, "llama"), folder / "prior.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not steered")
        wrapped = get_peft_model(model, drift(folder, target_modules=["q_proj"]))
    assert {s.name.split(".")[-2] for s in steered_of(wrapped)} == {"q_proj"}


def test_guide_where_nothing_that_is_trained_has_a_delta(pairs):
    """Norms alone, which no prior of projections holds."""
    folder = pairs("llama")
    model = load(folder, "llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(
        ValueError, match=r"^Nothing that is trained here has a Δ in the prior '.*': it steers nothing\.$"
    ):
        guide(model, ReasoningPrior.load(folder / "prior.safetensors"))


def test_guide_again_keeps_what_training_started_from(pairs):
    """W_0 of a bias that has moved since is still the base's."""
    folder = pairs("qwen2_5_vl")
    model = get_peft_model(load(folder, "qwen2_5_vl"), LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"))
    held = {"drift_scale": "decoupled", "drift_target": "base"}
    guide(model, **held, drift_alpha=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}
    train(model)
    moved = {n: (p - before[n]).norm() for n, p in model.named_parameters() if n in before}
    assert moved and all(distance > 0 for distance in moved.values())
    guide(model, **held, drift_alpha=1 / 1e-3)  # lr·a = 1: all the way back
    train(model, 1)
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p.detach(), before[name])


@pytest.mark.parametrize("target", ["residual", "delta"])
def test_guide_again_in_full_fine_tuning(pairs, tmp_path, target):
    """Of this prior it is known that it fitted before the weights moved; another one is compared with them."""
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    model = guide(load(folder, "llama"), prior, drift_target=target)
    start = {s.name: s.prior["W0"].clone() for s in steered_of(model) if "W0" in s.prior}
    assert bool(start) == (target == "residual")
    with torch.no_grad():
        for s in steered_of(model):
            s.parameter("W").add_(torch.randn_like(s.parameter("W")))
    guide(model, prior, drift_target=target, drift_alpha=0.1)
    assert {s.alpha for s in steered_of(model)} == {0.1}
    assert all(torch.equal(s.prior["W0"], start[s.name]) for s in steered_of(model) if start)
    build_prior(folder / "expert", folder / "base", tmp_path / "other.safetensors", rank=4, progress=False)
    with pytest.raises(ValueError, match="was built for other base weights"):
        guide(model, tmp_path / "other.safetensors")


def test_guide_again_after_training_is_no_missed_guidance(pairs, tmp_path):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    train(guide(model, folder / "prior.safetensors"))
    for strength in (0.1, 0.2):
        guide(model, folder / "prior.safetensors", drift_alpha=strength)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)


def test_guide_says_that_an_adapter_is_frozen(pairs, tmp_path):
    """As PEFT loads it; one that is not active waits for its turn."""
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    model.add_adapter("later", LoraConfig(r=4, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("default", "later"):
            guide(model, folder / "prior.safetensors", name)
    frozen = PeftModel.from_pretrained(load(folder, "llama"), tmp_path)
    with pytest.warns(UserWarning, match=r"^The adapter 'default' is frozen, .*: load it with is_trainable=True"):
        guide(frozen, folder / "prior.safetensors")


VARIANTS = {
    "DoraLinearVariant": {"use_dora": True},
    "DoraEmbeddingVariant": {"use_dora": True, "target_modules": ["embed_tokens"]},
    "KasaLinearVariant": variant("kasa_config", "KasaConfig"),
    "MontecloraLinearVariant": variant("monteclora_config", "MontecloraConfig"),
    "MiCALinearVariant": {"init_lora_weights": "mica"},
    "BdLoraLinearVariant": variant("use_bdlora", "BdLoraConfig", target_modules_bd_a=["q_proj"], nblocks=2),
}


@pytest.mark.parametrize("name", [known(name, settings) for name, settings in VARIANTS.items()])
def test_variants_with_another_chain_rule(pairs, name):
    folder = pairs("llama")
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **VARIANTS[name]})
    model = get_peft_model(load(folder, "llama"), lora)
    with pytest.raises(ValueError, match=f"uses {name}, whose chain rule is not plain LoRA's: train it without"):
        guide(model, str(folder / "prior.safetensors"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_hold_a_part_of_the_weights(pairs, start):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    with pytest.raises(ValueError, match=f"starts with init_lora_weights='{start}', which moves a part of the base"):
        guide(model, str(folder / "prior.safetensors"))
    assert not steered_of(model)


def test_guide_refuses(pairs):
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    with pytest.raises(ValueError, match="has no LoRA layers on its language model, and nothing of that is trainable"):
        guide(load(folder, "llama").requires_grad_(False), prior)
    negative = get_peft_model(load(folder, "llama"), LoraConfig(lora_alpha=-4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has the LoRA scaling -0\.5, and drift_target='factors' divides by it"):
        guide(negative, prior, drift_target="factors")
    own = wrap(load(folder, "llama"), drift(folder))
    with pytest.raises(ValueError, match="steered by its DriftConfig already"):
        guide(own, prior)
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        guide(copy.deepcopy(own), prior, "other")
    empty = load(folder, "llama").to("meta")
    with pytest.raises(ValueError, match="on the meta device, without weights"):
        guide(empty, prior)
    with pytest.raises(ValueError, match=r"guide\(\) takes the model first, then the prior, but got ReasoningPrior"):
        guide(prior, own)


OTHER_METHODS = {
    "LOKR": LoKrConfig(target_modules=["q_proj"]),
    "OFT": OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=2),  # trains tensors of the language model's names
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_methods_of_peft_that_are_not_lora(pairs, method):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), OTHER_METHODS[method])
    message = f"The adapter 'default' is {method}: guidance steers LoRA's factors, so make it with LoraConfig"
    for adapter_name in (None, "default"):
        with pytest.raises(ValueError, match=message):
            guide(model, folder / "prior.safetensors", adapter_name)


@pytest.mark.parametrize("trained", [None, ["o_proj"]])
def test_adalora_whose_layers_are_lora_layers(pairs, trained):
    """Modules to save could be steered beside it, as beside other methods; its factors could not."""
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=4, modules_to_save=trained)
    model = get_peft_model(load(pairs("llama"), "llama"), config)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is adapted by AdaLoRA: guidance steers"):
        guide(model, pairs("llama") / "prior.safetensors")


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "drift_scale='adaptiv' is unknown", {"drift_scale": "adaptiv"}),
        (TypeError, r"but got 'drift_alfa'; did you mean drift_alpha\?$", {"drift_alfa": 1.0}),
        (TypeError, r"but got 'init_lora_weight'; did you mean init_lora_weights\?$", {"init_lora_weight": "drift"}),
        (TypeError, "takes the drift_… settings of DriftConfig, but got 'lora_alpha'", {"lora_alpha": 8}),
        (TypeError, "takes the drift_… settings of DriftConfig, but got 'drift_steps'", {"drift_steps": 3}),
        (TypeError, "takes the drift_… settings of DriftConfig, but got 'prior_sha256'", {"prior_sha256": "0f"}),
        (
            ValueError,
            "drift_modules names 'norm', but nothing that would be steered matches it: there is attn",
            {"drift_modules": ["norm"]},
        ),
    ],
)
def test_guide_takes_the_settings_of_the_guidance_alone(pairs, error, message, settings):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(error, match=message):
        guide(model, ReasoningPrior.load(folder / "prior.safetensors"), **settings)
    assert not any(hasattr(module, "drift_peft") for module in model.modules())
