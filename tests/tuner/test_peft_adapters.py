"""What PEFT promises for LoRA in a model holds for steered adapters: merged, switched off, several of them, swapped."""

import copy

import pytest
import torch
from older import FORGETS_CONFIG, deletes_saved_modules, trains_what_was_swapped, weighs_alone, weighs_by_svd
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_cases import CASES, cases_but, equal, every_case, files, lora_layers, quiet, steering

from drift_peft import DriftConfig, telemetry
from drift_peft.tuner.steered import STEERED

pytestmark = quiet


# Merged, disabled, unloaded


@every_case
def test_merging(at):
    model = at.trained()
    merged, before = copy.deepcopy(model), at.logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in lora_layers(model))
    torch.testing.assert_close(at.logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(at.logits(model), before, rtol=1e-4, atol=1e-5)
    assert telemetry(at.train(model))["guided_steps"] == 4

    merged = merged.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert hasattr(merged, "peft_config") != FORGETS_CONFIG
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in at.base().state_dict().items()
    }
    torch.testing.assert_close(at.logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not at.same(merged, at.base())


@pytest.mark.parametrize("case", ["plain", "embedding", "all linear"])
def test_an_adapter_with_nan_is_not_merged(at):
    model = at.trained()
    weights = {n: p.clone() for n, p in model.named_parameters() if "proj.base_layer" in n}
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            p.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert weights and equal({n: p for n, p in model.named_parameters() if n in weights}, weights)


@cases_but("biases")
def test_disabling(at):
    base, model = at.base(), at.trained()
    before = at.logits(model)
    with model.disable_adapter():
        assert torch.equal(at.logits(model), at.logits(base))
    assert torch.equal(at.logits(model), before) and not torch.equal(before, at.logits(base))
    assert telemetry(at.train(model))["guided_steps"] == 4


@every_case
def test_unloading(at):
    """The base comes back bitwise, but for what PEFT leaves in the model: trained biases and modules to save."""
    base, model = at.base(), at.trained()
    steered = steering(model)
    unloaded = model.unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in unloaded.modules())
    assert steered and not any(s in STEERED for s in steered)
    expected, found = base.state_dict(), unloaded.state_dict()
    assert expected.keys() == found.keys()
    moved = {name for name in expected if not torch.equal(expected[name], found[name])}
    left = ("norm.weight", "lm_head.weight") if "modules_to_save" in at.settings else ("bias",)
    assert all(name.endswith(left) for name in moved)
    assert bool(moved) == (not {"bias", "modules_to_save"}.isdisjoint(at.settings))


# Several adapters


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=deletes_saved_modules if c == "head and norm" else ()) for c in CASES if c != "biases"],
)
def test_adapters_come_and_go(at):
    base, model = at.base(), at.trained()
    first, steered = at.logits(model), steering(model)
    model.add_adapter("other", at.config())
    assert torch.equal(at.logits(model), first)
    both = [s.adapter for s in steering(model)]
    assert both.count("default") == both.count("other") == len(steered)
    model.set_adapter("other")
    other = at.logits(at.train(model, 3, seed=1))
    assert not torch.equal(other, first)
    model.set_adapter("default")
    assert torch.equal(at.logits(model), first)
    assert [config.drift_steps for config in model.peft_config.values()] == [2, 3]

    model.delete_adapter("default")  # the active one
    assert model.active_adapters == ["other"] and torch.equal(at.logits(model), other)
    assert {s.adapter for s in steering(model)} == {"other"} and not any(s in STEERED for s in steered)
    assert telemetry(at.train(model, 1))["guided_steps"] == 4
    model.delete_adapter("other")
    assert model.active_adapters == [] and not steering(model)
    assert torch.equal(at.logits(model.base_model), at.logits(base))


@pytest.mark.parametrize("kind", ["linear", "cat", pytest.param("svd", marks=weighs_by_svd), "dare_ties"])
@pytest.mark.parametrize("case", ["plain", "decoupled"])
def test_a_weighted_adapter_is_plain_lora(at, tmp_path, kind):
    model = at.trained()
    model.add_adapter("other", at.config())
    model.set_adapter("other")
    at.train(model, seed=1)
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    model.add_weighted_adapter(["default", "other"], [0.75, -0.5], "mixed", combination_type=kind, **density)
    assert [type(config) for config in model.peft_config.values()] == [DriftConfig, DriftConfig, LoraConfig]
    assert not any(s.adapter == "mixed" for s in steering(model))
    if kind == "cat":
        for layer in lora_layers(model):
            expected = 0.75 * layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
            torch.testing.assert_close(layer.get_delta_weight("mixed"), expected)
    model.set_adapter("mixed")
    mixed = at.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    assert files(tmp_path / "mixed") == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(at.logits(at.stock(tmp_path / "mixed")), mixed)
    model.set_adapter("default")
    assert telemetry(at.train(model, 1))["guided_steps"] == 3


@weighs_alone
@cases_but("biases", "patterns")  # of rank-stabilized scalings PEFT takes no account
def test_one_weighted_adapter(at):
    model = at.trained()
    model.add_weighted_adapter(["default"], [-0.5], "scaled")
    for layer in lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("scaled"), -0.5 * layer.get_delta_weight("default"))


# Hot-swapping: PEFT swaps the factors alone


@pytest.mark.parametrize(
    ("rank", "prepared"), [pytest.param(4, False, marks=trains_what_was_swapped), (2, False), (8, False), (8, True)]
)
@pytest.mark.parametrize("case", ["plain", "decoupled"])
def test_hot_swapping(at, tmp_path, rank, prepared):
    """Into a model that stock PEFT loaded, and into one that is steered; factors of another rank are padded."""
    at.trained().save_pretrained(tmp_path / "first")
    second = at.train(at.model(r=rank, lora_alpha=9), seed=1)
    second.save_pretrained(tmp_path / "second")
    for model in (at.stock(tmp_path / "first"), at.trained()):
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
        torch.testing.assert_close(at.logits(model), at.logits(second), rtol=1e-4, atol=1e-5)
    if rank == 4 and not prepared:
        assert telemetry(at.train(model))["guided_steps"] == 4
