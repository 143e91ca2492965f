"""guide(init_lora_weights="drift"): an adapter that something else has made gets the start of a DriftConfig."""

import json
import warnings

import pytest
import torch
from pairs import IDS, drift, load, train
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from drift_peft import DriftConfig, ReasoningPrior, guide, telemetry
from drift_peft.tuner import is_new

TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}


def wrapped(folder, family="llama", kind="fp32", **changes):
    torch.manual_seed(3)
    return get_peft_model(load(folder, family, kind), LoraConfig(**{**TARGETS, **changes}))


def started(folder, model=None, **settings):
    model = wrapped(folder) if model is None else model
    return guide(model, folder / "prior.safetensors", init_lora_weights="drift", **settings)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def assert_same(model, other):
    got, want = adapters(model), adapters(other)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


CASES = {
    "the directions alone": ({}, {}),
    "a part of Δ": ({}, {"drift_start": 0.4}),
    "all of Δ": ({}, {"drift_start": 1.0}),
    "rslora, ranks": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"drift_start": 0.4}),
    "of few directions": ({}, {"drift_start": 0.4, "drift_rank": 2, "drift_spectrum": "flat"}),
    "a module without Δ": ({"target_modules": ["q_proj", "lm_head"]}, {"drift_start": 0.4}),
    "decoupled": ({}, {"drift_scale": "decoupled", "drift_target": "factors", "drift_start": 0.4}),
    "another start of PEFT": ({"init_lora_weights": "gaussian"}, {"drift_start": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*have no Δ in the prior:UserWarning")
def test_it_is_that_of_drift_config_and_trains_the_same(pairs, case):
    folder, (lora, settings) = pairs("llama"), CASES[case]
    model = started(folder, wrapped(folder, **lora), **settings)
    torch.manual_seed(3)
    same = {**TARGETS, **lora, "init_lora_weights": "drift"}
    ours = get_peft_model(load(folder, "llama"), DriftConfig(prior=folder / "prior.safetensors", **same, **settings))
    assert_same(model, ours)
    train(model), train(ours)
    assert_same(model, ours)
    assert telemetry(model) == telemetry(ours)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_on_other_bases(pairs, kind):
    folder = pairs("qwen2_5_vl")
    model = started(folder, wrapped(folder, "qwen2_5_vl", kind, target_modules=["q_proj"]), drift_start=0.5)
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    held = [m for name, m in model.named_modules() if isinstance(m, LoraLayer) and "visual" not in name]
    assert held
    for layer, name in zip(held, sorted(n for n in prior if "q_proj" in n), strict=True):
        A, B = (getattr(layer, f"lora_{factor}")["default"].weight for factor in "AB")
        weight = prior[name]
        delta = (weight.U[:, :4].float() * weight.S[:4]) @ weight.Vh[:4].float()
        assert (2 * (B @ A).float() - 0.5 * delta).norm() < 1e-2 * delta.norm()


def test_without_it_the_start_stays(pairs):
    folder = pairs("llama")
    model, plain = wrapped(folder), wrapped(folder)
    guide(model, folder / "prior.safetensors")
    assert_same(model, plain)


def test_the_function_is_unchanged_without_a_part_of_delta(pairs):
    folder = pairs("llama")
    model = wrapped(folder)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert torch.equal(started(folder, model)(input_ids=IDS).logits, before)
        assert not torch.equal(started(folder, drift_start=0.4)(input_ids=IDS).logits, before)


# On disk


def test_it_is_stored_as_that_of_a_drift_config(pairs, tmp_path):
    folder = pairs("llama")
    train(started(folder, drift_start=0.4)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert "| start | 0.4 of Δ |" in (tmp_path / "README.md").read_text()
    config = DriftConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.drift_start) == ("drift", 0.4)
    model = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
    assert telemetry(model)["guided_steps"] == 3 and not is_new(model)
    guide(wrapped(folder), folder / "prior.safetensors").save_pretrained(tmp_path / "own")
    assert DriftConfig.stored(tmp_path / "own")["init_lora_weights"] is True
    started(folder).save_pretrained(tmp_path / "directions")
    assert DriftConfig.stored(tmp_path / "directions")["init_lora_weights"] == "drift"


@pytest.mark.parametrize("drift_start", [0.0, 0.4])
def test_other_settings_afterwards_leave_the_start_what_it_was(pairs, tmp_path, drift_start):
    model = started(pairs("llama"), drift_start=drift_start)
    guide(model, pairs("llama") / "prior.safetensors", drift_alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    stored = DriftConfig.stored(tmp_path)
    assert (stored["init_lora_weights"], stored["drift_start"], stored["drift_alpha"]) == ("drift", drift_start, 0.1)


def test_a_start_is_saved_in_silence_and_training_without_hooks_is_told_of(pairs, tmp_path):
    model = started(pairs("llama"), drift_start=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert telemetry(model)["guided_steps"] == 0
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in adapters(model).values():
            p -= 0.05 * p.grad
    with pytest.warns(UserWarning, match="the guidance never ran"):
        model.save_pretrained(tmp_path)


# What cannot have it


def test_only_an_adapter_that_nothing_has_filled(pairs):
    folder = pairs("llama")
    model = wrapped(folder)
    assert is_new(model)
    train(started(folder, model))
    before = {name: p.detach().clone() for name, p in adapters(model).items()}
    with pytest.raises(
        ValueError, match=r"q_proj\.weight has been trained .* already.*: leave out init_lora_weights\.$"
    ):
        started(folder, model)
    assert all(torch.equal(before[name], p) for name, p in adapters(model).items())
    assert telemetry(model)["guided_steps"] == 3  # and it is steered as before
    with pytest.raises(ValueError, match=r"or has had its start: leave out init_lora_weights and drift_start\.$"):
        started(folder, model, drift_start=0.4)


@pytest.mark.parametrize("which", [0, -1])
def test_each_layer_of_it_must_be_new(pairs, which):
    model = wrapped(pairs("llama"))
    with torch.no_grad():
        [p for name, p in adapters(model).items() if "lora_B" in name][which][0, 0] = 1e-3
    assert not is_new(model)
    with pytest.raises(ValueError, match="has been trained or merged already, or has had its start"):
        started(pairs("llama"), model)


def test_not_while_it_is_merged(pairs):
    model = wrapped(pairs("llama"))
    model.merge_adapter()
    assert not is_new(model)
    with pytest.raises(ValueError, match="has been trained or merged already"):
        started(pairs("llama"), model)


def test_only_an_adapter_that_is_whole(pairs):
    folder = pairs("llama")
    model = wrapped(folder)
    B = next(p for name, p in adapters(model).items() if "lora_B" in name)
    B.ds_shape, B.data = B.shape, B.data.new_empty(0)  # as ZeRO 3 leaves a parameter between two uses
    assert not is_new(model)
    with pytest.raises(ValueError, match=r"is sharded already, .*: call guide\(\) before the model is sharded"):
        started(folder, model)


def test_what_is_new(pairs):
    folder = pairs("llama")
    assert is_new(wrapped(folder)) and is_new(wrapped(folder, "llama", "bf16"))
    assert not is_new(load(folder, "llama"))  # trained in full
    assert not is_new(wrapped(folder, init_lora_weights="gaussian"))  # somebody has chosen it
    assert not is_new(wrapped(folder, init_lora_weights=False))  # lora_B is not 0
    assert not is_new(get_peft_model(load(folder, "llama"), drift(folder)))
    assert not is_new(wrapped(folder).to("meta"))
    ada = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    assert not is_new(get_peft_model(load(folder, "llama"), ada))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"drift_start": 0.4}, r"^drift_start=0\.4 puts .* into a new adapter, .*: add init_lora_weights='drift', or"),
        ({"init_lora_weights": True}, r"gives an adapter the start 'drift', .* but got init_lora_weights=True\.$"),
        ({"init_lora_weights": "drift", "drift_start": 2}, r"^drift_start is a share of Δ, a number from 0 to 1"),
        ({"init_lora_weights": "drift", "drift_modules": "mlp"}, r"^drift_modules names 'mlp', but nothing that"),
    ],
)
def test_settings_that_are_refused_leave_the_adapter_alone(pairs, given, said):
    folder = pairs("llama")
    model = wrapped(folder, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=said):
        guide(model, folder / "prior.safetensors", **given)
    assert is_new(model) and not any(hasattr(module, "drift_peft") for module in model.modules())


def test_what_has_no_adapter_or_no_prior_has_no_start(pairs):
    folder = pairs("llama")
    with pytest.raises(
        ValueError, match=r"^drift_start=0\.5 puts .* into a new adapter, and there is none here: leave"
    ):
        guide(load(folder, "llama"), folder / "prior.safetensors", drift_start=0.5)
    with pytest.raises(ValueError, match=r"guide\(\) was given no adapter: leave it out\.$"):
        started(folder, load(folder, "llama"))
    with pytest.raises(ValueError, match=r"guide\(\) was given no prior: leave it out\.$"):
        guide(wrapped(folder), drift_scale="decoupled", drift_target="base", init_lora_weights="drift")


def test_a_part_of_delta_goes_into_one_adapter(pairs):
    folder = pairs("llama")
    model = wrapped(folder)
    model.add_adapter("other", LoraConfig(**TARGETS))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"each of the adapters default, other: name one with adapter_name, or leave"):
        started(folder, model, drift_start=0.4)
    started(folder, model)  # the directions alone, which add nothing
    started(folder, model, drift_start=0.4, adapter_name="other")
    filled = {name.split(".")[-2] for name, p in adapters(model).items() if "lora_B" in name and p.any()}
    assert filled == {"other"}


def test_a_scaling_that_is_not_positive(pairs):
    folder = pairs("llama")
    with pytest.raises(ValueError, match=r"has the LoRA scaling 0\.0, and drift_start divides by it: leave out drift_"):
        started(folder, wrapped(folder, lora_alpha=0), drift_start=0.4)
    both = {"drift_start": 0.4, "drift_scale": "decoupled", "drift_target": "factors"}
    with pytest.raises(ValueError, match=r"leave out drift_target='factors' and drift_start\.$"):
        started(folder, wrapped(folder, lora_alpha=0), **both)
