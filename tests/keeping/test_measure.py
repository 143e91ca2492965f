"""How far a model is from each answer of a keep set."""

import copy

import pytest
import torch
from keep_sets import dense_logprobs, make
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from drift_peft import language_model_targets
from drift_peft.keeping import measure, summarize


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def whole(folder):
    return make(folder, "measured.safetensors", samples=6, top_k=64)


def wrapped(folder):
    """LoRA whose B is not zero, so that the model has gone from the VLM."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=language_model_targets(model)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def test_the_distance_is_that_from_the_model_with_its_adapters_off(folder, processor, whole):
    model = wrapped(folder).eval()
    found = measure(model, whole, processor, batch_size=4, progress=False)
    for distance, sample in zip(found, whole, strict=True):
        ours = dense_logprobs(copy.deepcopy(model).double(), processor, sample)
        with model.disable_adapter():
            theirs = dense_logprobs(copy.deepcopy(model).double(), processor, sample)
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
        assert distance.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    summary = summarize(found)
    assert summary["total"]["answers"] == len(whole)
    low, high = summary["total"]["kl_interval"]
    assert low <= summary["total"]["kl"] <= high


def test_a_model_that_has_not_changed_is_at_a_distance_of_zero(folder, processor, whole):
    model = wrapped(folder).train()
    tower = model.get_base_model().get_encoder("image").eval()
    with model.disable_adapter():
        distances = measure(model, whole, processor, progress=False)
    assert all(d.kl < 1e-6 and d.agreement == 1 for d in distances) and model.training
    assert not tower.training
    assert {d.kind for d in distances} == set(whole.kinds)
