"""What may change between steps of the settings of a DriftConfig, and what is fixed once a model is wrapped."""

import copy
from dataclasses import fields

import numpy as np
import pytest
from pairs import drift, load, train
from peft import get_peft_model

from drift_peft import DriftConfig
from drift_peft.tuner.settings import CHANGING, FIXED, DriftSettings
from drift_peft.tuner.steered import steered_of

FOREIGN = {"drift_steps", "prior_sha256", "quantization"}  # filled in, and no user's to change


@pytest.fixture
def model(pairs):
    return get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama"), drift_alpha=0.3))


def test_every_setting_is_one_of_both():
    assert {*CHANGING, *FIXED, *FOREIGN} == {field.name for field in fields(DriftSettings)}
    assert not {*CHANGING} & {*FIXED}


CHANGED = [
    *[("drift_modules", value) for value in ("attn", "xyz", ["mlp"])],
    *[("drift_spectrum", "flat"), ("drift_rank", 2), ("drift_norm", "weight"), ("drift_sketch", None)],
    *[("prior", "other.safetensors"), ("drift_start", 0.5), ("drift_target", "delta"), ("drift_target", "dleta")],
]


@pytest.mark.parametrize(("name", "value"), CHANGED)
def test_what_says_where_the_pull_goes_is_fixed(model, name, value):
    config = model.peft_config["default"]
    before = getattr(config, name)
    with pytest.raises(ValueError, match=rf"^{name}=.* comes too late, since what is steered was made with {name}="):
        setattr(config, name, value)
    assert getattr(config, name) == before
    setattr(config, name, before)  # no change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("drift_alpha", value) for value in (-1, float("nan"), None, "x")],
        *[("drift_warmup_steps", -5), ("drift_decay_steps", 0), ("drift_scale", "foo"), ("drift_scale", "decoupled")],
        *[("drift_alpha_pattern", {"(": 1.0}), ("drift_log_kinds", 1)],
    ],
)
def test_what_is_out_of_range_is_refused_and_not_taken(model, name, value, tmp_path):
    config = model.peft_config["default"]
    before = getattr(config, name)
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before
    train(model, 1)
    model.save_pretrained(tmp_path)
    assert getattr(DriftConfig.from_pretrained(tmp_path), name) == before or name == "drift_log_kinds"


def test_the_strength_changes_between_steps(model):
    train(model, 1)
    config = model.peft_config["default"]
    config.drift_alpha, config.drift_alpha_pattern, config.drift_scale = np.float32(0.1), {"q_proj": 0.0}, "gradnorm"
    assert type(config.drift_alpha) is float  # as a DriftConfig takes it
    config.drift_warmup_steps, config.drift_decay_steps = 1, 5
    train(model, 1)
    assert {round(s.alpha, 6) for s in steered_of(model)} == {0.0, 0.1}


def test_a_copy_makes_another_model(pairs, model):
    """It is not in force itself; a model's own is, also in a copy of the model."""
    with pytest.raises(ValueError, match="comes too late"):
        copy.deepcopy(model).peft_config["default"].drift_rank = 2
    config = drift(pairs("llama"))
    get_peft_model(load(pairs("llama"), "llama"), copy.deepcopy(config))
    config.drift_rank = 2
    assert {len(s.prior["S"]) for s in steered_of(get_peft_model(load(pairs("llama"), "llama"), config))} == {2}
