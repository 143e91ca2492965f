"""guide(model, prior): models that somebody else wrapped."""

import copy

import pytest
import torch
from pairs import drift, load, train, wrap
from peft import LoraConfig, get_peft_model

from drift_peft import ReasoningPrior, guide


def test_guide_equals_drift_config(pairs):
    folder = pairs("llama")
    steered = wrap(load(folder, "llama"), drift(folder, lora_dropout=0.0))
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


def test_guide_refuses(pairs):
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    with pytest.raises(ValueError, match="has no LoRA layers on its language model"):
        guide(load(folder, "llama"), prior)
    dora = get_peft_model(load(folder, "llama"), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="uses DoraLinearVariant, whose chain rule is not plain LoRA's"):
        guide(dora, prior)
    negative = get_peft_model(load(folder, "llama"), LoraConfig(lora_alpha=-4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has the LoRA scaling -0\.5, but drift_target='factors' divides by it"):
        guide(negative, prior, drift_target="factors")
    own = wrap(load(folder, "llama"), drift(folder))
    with pytest.raises(ValueError, match="steered by its DriftConfig already"):
        guide(own, prior)
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        guide(copy.deepcopy(own), prior, "other")
    with pytest.raises(ValueError, match="drift_scale='adaptiv' is unknown"):
        guide(
            get_peft_model(load(folder, "llama"), LoraConfig(target_modules=["q_proj"])), prior, drift_scale="adaptiv"
        )
