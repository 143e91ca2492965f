"""A prior that does not belong to the model, or does not reach its targets, is refused or reported, by name."""

import pytest
from pairs import drift, load, untouched
from peft import get_peft_model
from tiny import tiny_llm

from drift_peft import DriftConfig


def test_targets_without_a_delta_are_reported(pairs):
    folder = pairs("llava_next")
    targets = r".*(language_model|vision_tower).*\.q_proj"
    with pytest.warns(UserWarning, match=r"1 targeted modules have no Δ .*not steered: model\.vision_tower"):
        model = get_peft_model(load(folder, "llava_next"), drift(folder, target_modules=targets))
    steered = [n for n, m in model.named_modules() if "default" in getattr(m, "drift", {})]
    assert len(steered) == 2 and all("language_model" in n for n in steered)


def test_no_target_with_a_delta(pairs):
    folder = pairs("llava_next")
    model = load(folder, "llava_next")
    with pytest.raises(ValueError, match=r"None of the 1 targeted modules, such as .*vision_tower.* has a Δ"):
        get_peft_model(model, drift(folder, target_modules=r".*vision_tower.*\.q_proj"))
    assert untouched(model)


def test_prior_of_another_depth(pairs):
    model = tiny_llm("llava", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"another model: 7 of its 14 weights, such as layers\.1\.mlp\.down_proj"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


def test_prior_of_another_width(pairs):
    model = tiny_llm("llava", intermediate_size=192)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight is \[128, 64\] there and \[192, 64\] here"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


def test_prior_of_another_base(pairs):
    model = tiny_llm("llava", seed=5)
    with pytest.raises(ValueError, match=r"built for other base weights: its fingerprint is off by 1\d\d%"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


@pytest.mark.parametrize(
    "source, error", [("missing.safetensors", FileNotFoundError), ("base/config.json", ValueError)]
)
def test_prior_that_is_none(pairs, source, error):
    model = load(pairs("llama"), "llama")
    with pytest.raises(error, match=r"missing|is no prior"):
        get_peft_model(model, DriftConfig(prior=pairs("llama") / source))
    assert untouched(model)


def test_factors_need_a_prior_of_the_adapters_rank(pairs):
    folder = pairs("llama")
    config = DriftConfig(prior=folder / "prior.safetensors", r=12, drift_target="factors")
    model = load(folder, "llama")
    with pytest.raises(ValueError, match="rank 8 for layers"):
        get_peft_model(model, config)
    assert untouched(model)
