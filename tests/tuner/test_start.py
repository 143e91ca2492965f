"""drift_start: the share of Δ that an adapter holds before the first step, against the oracle's dense Δ_r."""

import copy
import warnings

import pytest
import torch
from pairs import drift, load, train, wrap
from peft import PeftModel, get_peft_model
from twin import backward, make_whole_pair, oracle_layers, sgd, trainable
from twin import train as train_twin

from drift_peft import DriftConfig, ReasoningPrior, guide, merge_baseline, telemetry


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole_pair(tmp_path_factory.mktemp("whole"))


def started(pair, drift_start=0.5, **settings):
    config = DriftConfig(prior=pair.path, **{"r": 4, "lora_alpha": 6, "drift_start": drift_start, **settings})
    return get_peft_model(copy.deepcopy(pair.base), config)


def assert_holds(model, prior, share, rank=None, power=1.0):
    layers = list(oracle_layers(model, prior, rank, power=power))
    assert layers
    for _, oracle in layers:
        acts = oracle.adapters.T if oracle.embedding else oracle.adapters
        delta = oracle.delta.T if oracle.embedding else oracle.delta
        assert (acts - share * delta).norm() <= 1e-5 * delta.norm()


CASES = [
    {},
    {"drift_start": 1},
    {"use_rslora": True, "alpha_pattern": {"q_proj": 2}},
    {"rank_pattern": {"q_proj": 2, "up_proj": 3}},
    {"drift_alpha": 0.0},
    {"drift_scale": "decoupled", "drift_target": "factors"},
    {"drift_scale": "decoupled", "drift_target": "base"},
    {"target_modules": ["embed_tokens", "q_proj"]},
]


@pytest.mark.parametrize("settings", CASES)
def test_the_adapter_is_that_share_of_delta(whole, settings):
    model = started(whole, **settings)
    assert_holds(model, whole.prior, settings.get("drift_start", 0.5))


@pytest.mark.parametrize(
    ("settings", "which"),
    [
        ({"drift_rank": 2}, {"rank": 2}),
        ({"drift_rank": 2, "drift_spectrum": "flat"}, {"rank": 2, "power": 0}),
        ({"drift_spectrum": 0.5}, {"power": 0.5}),
    ],
)
def test_of_what_the_settings_make_of_delta(whole, settings, which):
    assert_holds(started(whole, **settings), whole.prior, 0.5, **which)


def test_a_prior_of_less_rank_fills_what_it_has(whole):
    with pytest.warns(UserWarning, match="their remaining rows of lora_A start as PEFT's do"):
        model = started(whole, r=12, lora_alpha=12)
    assert_holds(model, whole.prior, 0.5)
    layer, _ = next(oracle_layers(model, whole.prior))
    assert layer.lora_A["default"].weight[8:].any() and not layer.lora_B["default"].weight[:, 8:].any()


def test_only_what_is_steered_starts_so(whole):
    model = started(whole, drift_modules="attn", target_modules=["q_proj", "up_proj"])
    for name, B in model.named_parameters():
        if "lora_B" in name:
            assert B.any() == ("q_proj" in name), name


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_on_other_bases(pairs, family, kind):
    folder = pairs(family)
    model = wrap(load(folder, family, kind), drift(folder, drift_start=0.5))
    seen = telemetry(model)
    assert seen["absorbed"] == pytest.approx(0.5, abs=0.01) and seen["alignment"] > 0.999
    assert telemetry(train(model))["guided_steps"] == 3


def test_of_a_merged_base_it_is_a_share_of_what_is_left(pairs, tmp_path):
    folder = pairs("llama")
    merge_baseline("task_arithmetic", folder / "expert", folder / "base", tmp_path / "base", scale=0.4, progress=False)
    model = get_peft_model(load(tmp_path, "llama"), drift(folder, drift_start=0.5))
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    assert_holds(model, prior, 0.5 * 0.6)


def test_it_is_stored_and_goes_on_from_its_weights(pairs, tmp_path):
    folder = pairs("llama")
    model = train(get_peft_model(load(folder, "llama"), drift(folder, drift_start=0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert "start = 0.5" in (tmp_path / "README.md").read_text()
    config = DriftConfig.from_pretrained(tmp_path)
    assert config.drift_start == 0.5
    again = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
    plain = PeftModel.from_pretrained(load(folder, "llama"), tmp_path)
    for other in (again, plain):
        state = other.state_dict()
        for name, factor in model.state_dict().items():
            if "lora_" in name:
                assert torch.equal(state[name], factor)
    with warnings.catch_warnings():  # a start is past: another one makes no difference to what is loaded
        warnings.simplefilter("error", UserWarning)
        fresh = get_peft_model(load(folder, "llama"), drift(folder))
        fresh.load_adapter(tmp_path, "default", is_trainable=True)


def test_without_guidance_it_is_said_on_the_card(pairs, tmp_path):
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder, drift_alpha=0.0, drift_start=0.25)).save_pretrained(tmp_path)
    assert "without guidance, from a start with 0.25 of what" in (tmp_path / "README.md").read_text()


def test_an_optimizer_without_hooks_is_told_of_and_a_start_is_not(whole, tmp_path):
    model = started(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "start")
    backward(model)
    with torch.no_grad():
        for p in trainable(model):
            p -= 0.05 * p.grad
    with pytest.warns(UserWarning, match="the guidance never ran"):
        model.save_pretrained(tmp_path / "moved")
    guided = started(whole)
    train_twin(guided, sgd(guided), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        guided.save_pretrained(tmp_path / "guided")


def test_guide_steers_what_has_started(whole):
    model = started(whole, drift_alpha=0.0)
    with pytest.raises(TypeError, match=r"^guide\(\) steers an adapter that has its start already: set drift_start in"):
        guide(model, whole.path, drift_start=0.5)
