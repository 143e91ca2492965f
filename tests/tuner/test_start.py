"""drift_start: the share of Δ that an adapter holds before the first step, against the oracle's dense Δ_r."""

import copy
import warnings

import pytest
import torch
from pairs import IDS, drift, load, train, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from twin import make_whole_pair, oracle_layers, trainable

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
    {"target_modules": ["embed_tokens", "q_proj"]},
]


@pytest.mark.parametrize("settings", CASES)
def test_the_adapter_is_that_share_of_delta(whole, settings):
    model = started(whole, **settings)
    assert_holds(model, whole.prior, settings.get("drift_start", 0.5))


def test_guide_gives_it_to_an_adapter_of_others(whole):
    """Embeddings as well, whose lora_A is 0 in a new adapter, and not lora_B."""
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj", "up_proj"])
    model = get_peft_model(copy.deepcopy(whole.base), lora)
    guide(model, whole.path, init_lora_weights="drift", drift_start=0.5)
    assert sum(oracle.embedding for _, oracle in oracle_layers(model, whole.prior)) == 1
    assert_holds(model, whole.prior, 0.5)


@pytest.mark.parametrize(
    ("settings", "which"),
    [
        ({"drift_rank": 2}, {"rank": 2}),
        ({"drift_rank": 6}, {"rank": 4}),  # as much as the adapter holds
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
    model.save_pretrained(tmp_path)
    assert "| start | 0.5 of Δ |" in (tmp_path / "README.md").read_text()
    config = DriftConfig.from_pretrained(tmp_path)
    assert config.drift_start == 0.5
    with pytest.raises(ValueError, match=r"had its start with drift_start=0\.5: leave out drift_start=1\.0\.$"):
        DriftConfig.from_pretrained(tmp_path, drift_start=1.0)
    assert DriftConfig.from_pretrained(tmp_path, drift_start=0.5).drift_start == 0.5
    assert DriftConfig.from_pretrained(tmp_path, drift_alpha=0, prior=None).drift_start == 0
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
    assert fresh.peft_config["default"].drift_start == 0.5  # that of these weights, as the card will say


def test_without_guidance_it_is_said_on_the_card(pairs, tmp_path):
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder, drift_alpha=0.0, drift_start=0.25)).save_pretrained(tmp_path)
    assert "without guidance, from a start with 0.25 of what" in (tmp_path / "README.md").read_text()


# What has moved


def saved_in_silence(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"drift_alpha_pattern": {"q_proj": 0.0}}])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_an_optimizer_without_hooks_is_told_of_and_a_start_is_not(pairs, tmp_path, kind, settings):
    """PEFT casts factors of a bf16 base to fp32, after ours has filled them."""
    folder = pairs("llama")
    model = wrap(load(folder, "llama", kind), drift(folder, drift_start=0.3, **settings))
    saved_in_silence(model, tmp_path / "start")
    model.get_base_model().model.layers[0].self_attn.q_proj.scale_layer(0.5)  # afterwards: the start is what it was
    saved_in_silence(model, tmp_path / "start")
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in trainable(model):
            p -= 0.05 * p.grad
    with pytest.warns(UserWarning, match="the guidance never ran"):
        model.save_pretrained(tmp_path / "moved")


def test_a_frozen_copy_of_the_start_and_a_padded_adapter_are_saved_in_silence(pairs, tmp_path):
    """As DPO keeps a reference, and as compiled hot swaps need it."""
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), drift(folder, drift_start=0.3))
    model.add_adapter("ref", drift(folder, drift_start=0.3))
    train(model)
    saved_in_silence(model, tmp_path / "both")
    padded = get_peft_model(load(folder, "llama"), drift(folder, drift_start=0.3))
    prepare_model_for_compiled_hotswap(padded, target_rank=8)
    saved_in_silence(padded, tmp_path / "padded")


def test_a_start_that_is_loaded_has_no_steps(pairs, tmp_path):
    """As FSDP2 spreads it over the ranks; what was trained has those of its file."""
    folder = pairs("llama")
    train(get_peft_model(load(folder, "llama"), drift(folder, drift_start=0.3))).save_pretrained(tmp_path)
    for trained in (False, True):
        model = get_peft_model(load(folder, "llama"), DriftConfig.from_pretrained(tmp_path))
        state = model.state_dict()
        if trained:
            weights = load_file(tmp_path / "adapter_model.safetensors")
            state |= {key.replace(".weight", ".default.weight"): value for key, value in weights.items()}
        model.load_state_dict(state)
        assert telemetry(model)["guided_steps"] == (3 if trained else 0)


def test_another_default_dtype_makes_no_difference(whole):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = started(whole)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_holds(model, whole.prior, 0.5)


# Where it cannot be


def merged(pairs, folder, **settings):
    pair = pairs("llama")
    folder.mkdir(exist_ok=True)
    given = {"scale": 1.0, "progress": False, **settings}
    merge_baseline("task_arithmetic", pair / "expert", pair / "base", folder / "base", **given)
    return load(folder, "llama")


@pytest.mark.parametrize("drift_alpha", [0.0, 1.0])
def test_a_base_that_has_all_of_delta_leaves_nothing_to_start_with(pairs, tmp_path, drift_alpha):
    model = merged(pairs, tmp_path)
    with pytest.raises(ValueError, match=r"nothing is left of Δ to steer toward: .* and without drift_start"):
        get_peft_model(model, drift(pairs("llama"), drift_start=0.5, drift_alpha=drift_alpha))
    part = merged(pairs, tmp_path / "part", modules=["attn"])
    with pytest.warns(UserWarning, match="which is all of Δ in 8 of 14 weights"):
        get_peft_model(part, drift(pairs("llama"), drift_start=0.5, drift_alpha=drift_alpha))


def test_what_steers_no_factor_has_no_start(whole):
    for settings in ({"modules_to_save": ["norm"], "drift_modules": "norm"}, {"bias": "all", "drift_modules": "bias"}):
        with pytest.raises(ValueError, match=r"^drift_start=0\.5 puts a part of Δ into LoRA factors, but none of them"):
            started(whole, **settings)


def test_a_start_that_was_merged_in_memory_is_noticed(pairs):
    folder = pairs("llama")
    base = get_peft_model(load(folder, "llama"), drift(folder, drift_start=0.2, drift_alpha=0.0)).merge_and_unload()
    with pytest.warns(UserWarning, match="A guided adapter was merged into this base"):
        get_peft_model(base, drift(folder, drift_start=0.2))
