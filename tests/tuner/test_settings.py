"""Where, when and how strongly the guidance acts, and LoRA's own settings beside it, against the oracle."""

import copy
import re

import pytest
import torch
from older import known, variant
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from reference import norm, schedule, spectrum
from twin import (
    ALPHA,
    BATCH,
    assert_guided_like_oracle,
    assert_same_update,
    backward,
    canonical,
    factors,
    make_whole_pair,
    oracle_layers,
    randomized,
    sgd,
    state,
    steered,
    train,
    train_by_oracle,
    trainable,
    twin_of,
)

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.tuner import guidance

two_modes = pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole_pair(tmp_path_factory.mktemp("whole"))


# Where


PLACES = [
    ("attn", r".*self_attn.*"),
    (["mlp", "q_proj"], r".*(mlp.*|q_proj)"),
    (r"layers\.0\..*", r"layers\.0\..*"),
    (["self_attn.[qk]_proj", r"1\.mlp\.down_proj"], r".*([qk]_proj|1\.mlp\.down_proj)"),
]


@pytest.mark.parametrize(("drift_modules", "there"), PLACES)
@two_modes
def test_where_the_bias_acts(pair, scale, target, drift_modules, there):
    """Elsewhere every factor steps bitwise as in plain LoRA."""
    model = steered(pair, scale, target, drift_modules=drift_modules)
    twin, plain, start = twin_of(pair, model), twin_of(pair, model), state(model)
    train(model, sgd(model), 1)
    train(plain, sgd(plain), 1)
    prior = {name: pair.prior[name] for name in pair.prior if re.fullmatch(there, name.removesuffix(".weight"))}
    assert 0 < len(prior) < 14
    train_by_oracle(twin, sgd(twin), prior, scale, target, 1)
    assert_same_update(model, twin, start)
    other = state(plain)
    moved = {canonical(n).split(".lora_")[0] for n, p in state(model).items() if not torch.equal(p, other[n])}
    assert moved == {name.removesuffix(".weight") for name in prior}


@two_modes
def test_how_strongly_the_bias_acts(pair, scale, target):
    """The first pattern that matches counts, else drift_alpha; 0 steers not at all."""
    pattern = {"q_proj": 0.0, r"layers\.1\.self_attn\..*": 0.5, "self_attn.*": 0.7, r"1\.mlp\.up_proj": 2}

    def alpha(name, step):
        if "q_proj" in name:
            return 0.0
        if "self_attn" in name:
            return 0.5 if "layers.1" in name else 0.7
        return 2 if name == "layers.1.mlp.up_proj.weight" else ALPHA[scale]

    assert_guided_like_oracle(pair, sgd, scale, target, drift_alpha_pattern=pattern, oracle={"alpha": alpha})


UNMATCHED = [
    (
        {"drift_modules": "norm"},
        r"drift_modules names 'norm', but nothing that would be steered matches it: there is attn, mlp\.",
    ),
    ({"drift_modules": ["attn", "q_prj"]}, r"drift_modules names 'q_prj', but nothing that would be"),
    ({"drift_modules": r"layers\.2\..*"}, r"drift_modules names 'layers.*2.*', but nothing"),
    ({"drift_modules": "proj"}, r"drift_modules names 'proj'"),  # the end of a name after a dot, not any part of it
    (
        {"drift_alpha_pattern": {"mlp.*": 1, "q_prj": 1}},
        r"drift_alpha_pattern names 'q_prj', but nothing that is steered matches it: its names are like layers\.0\.",
    ),
    (  # what drift_modules leaves out has no strength
        {"drift_modules": "attn", "drift_alpha_pattern": {"down_proj": 2.0}},
        r"drift_alpha_pattern names 'down_proj', but nothing that is steered matches it: its names are .*self_attn",
    ),
]


@pytest.mark.parametrize(("settings", "message"), UNMATCHED)
def test_settings_for_weights_that_are_not_there(pair, settings, message):
    base = copy.deepcopy(pair.base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, DriftConfig(prior=pair.path, **settings))
    assert not any(isinstance(m, LoraLayer) for m in base.modules())
    plain = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=message):
        guide(plain, pair.prior, **settings)


def test_settings_for_weights_that_are_not_there_without_a_prior(pair):
    base = copy.deepcopy(pair.base)
    held = {"drift_scale": "decoupled", "drift_target": "base", "drift_modules": "q_prj"}
    with pytest.raises(ValueError, match="drift_modules names 'q_prj'"):
        get_peft_model(base, DriftConfig(**held))
    with pytest.raises(ValueError, match="drift_modules names 'q_prj'"):
        guide(get_peft_model(base, LoraConfig(target_modules="all-linear")), **held)


# When


def test_schedule_by_hand():
    for warmup, decay, expected in [
        (0, None, [1, 1, 1, 1]),
        (4, None, [0, 0.25, 0.5, 0.75, 1, 1]),
        (0, 4, [1, 0.75, 0.5, 0.25, 0, 0]),
        (2, 2, [0, 0.5, 1, 0.5, 0, 0, 0]),
    ]:
        for step, value in enumerate(expected):
            assert guidance.schedule(step, warmup, decay) == schedule(step, warmup, decay) == value
            assert guidance.schedule(torch.tensor(float(step)), warmup, decay) == value


def scheduled(scale, warmup=3, decay=4):
    return lambda name, step: ALPHA[scale] * schedule(step, warmup, decay)


@pytest.mark.parametrize(
    ("scale", "target"), [("absolute", "residual"), ("adaptive", "delta"), ("decoupled", "factors")]
)
def test_warmup_and_decay(pair, scale, target):
    options = {"drift_warmup_steps": 3, "drift_decay_steps": 4, "steps": 9}
    assert_guided_like_oracle(pair, sgd, scale, target, oracle={"alpha": scheduled(scale)}, **options)


@pytest.mark.parametrize("how", ["optimizer", "save"])
def test_the_schedule_goes_on_when_training_does(pair, tmp_path, how):
    """Through a checkpoint's optimizer state, as Trainer resumes, and through the adapter's own folder."""
    settings = {"drift_warmup_steps": 3, "drift_decay_steps": 4, "dtype": torch.float32}
    model = steered(pair, "absolute", "residual", **settings)
    twin, start = twin_of(pair, model), state(model)
    before = sgd(model)
    train(model, before, 2)
    if how == "optimizer":
        again = steered(pair, "absolute", "residual", **settings)
        again.load_state_dict(model.state_dict())
        optimizer = sgd(again)
        optimizer.load_state_dict(before.state_dict())
    else:
        model.save_pretrained(tmp_path)
        config = DriftConfig.from_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path, config=config, is_trainable=True).train()
        optimizer = sgd(again)
    train(again, optimizer, 4)
    train_by_oracle(twin, sgd(twin), pair.prior, "absolute", "residual", 6, alpha=scheduled("absolute"))
    assert_same_update(again, twin, start, 1e-4)
    assert telemetry(again)["guided_steps"] == 6


def test_an_adapter_that_joins_later_has_a_schedule_of_its_own(pair):
    model = steered(pair)
    optimizer = sgd(model)
    train(model, optimizer, 3)
    model.add_adapter("second", DriftConfig(prior=pair.path, r=4, drift_warmup_steps=9))
    model.set_adapter("second")
    optimizer.add_param_group({"params": trainable(model)})
    train(model, optimizer, 2)
    assert [int(config.drift_steps) for config in model.peft_config.values()] == [3, 2]


@two_modes
def test_the_schedule_under_loss_scaling(pair, scale, target):
    """A step that is skipped on inf is none; the count is a tensor then, which nobody waits for."""
    settings = {"drift_warmup_steps": 2, "drift_decay_steps": 3, "dtype": torch.float32}
    model = steered(pair, scale, target, **settings)
    twin, start = twin_of(pair, model), state(model)
    optimizer, scaler = torch.optim.SGD(trainable(model), lr=0.05, fused=True), torch.amp.GradScaler("cpu", 2.0**8)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(input_ids=BATCH, labels=BATCH).loss).backward()
        if step == 2:
            trainable(model)[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert isinstance(model.peft_config["default"].drift_steps, torch.Tensor)
    alpha = scheduled(scale, 2, 3)
    train_by_oracle(twin, sgd(twin), pair.prior, scale, target, 5, alpha=alpha)
    assert_same_update(model, twin, start, 1e-4)
    assert telemetry(model)["guided_steps"] == 5


# Which singular directions


@pytest.mark.parametrize(("drift_spectrum", "power"), [("full", 1), ("flat", 0), (0.5, 0.5), (2, 2)])
def test_spectrum(pair, drift_spectrum, power):
    model = steered(pair, drift_spectrum=drift_spectrum, drift_rank=3)
    for layer, _ in oracle_layers(model, pair.prior):
        of, S = layer.drift_peft["default"], pair.prior[layer.drift_peft["default"].name].S[:3]
        torch.testing.assert_close(of.prior["S"].double(), spectrum(S, power))
        assert norm(of.prior["S"]) == pytest.approx(norm(S))  # so ‖Δ_r‖ is kept
        assert torch.equal(of.prior["S"], S) == (power == 1)  # bitwise
    for scale, target in (("gradnorm", "residual"), ("decoupled", "factors")):
        settings = {"drift_spectrum": drift_spectrum, "oracle": {"power": power}}
        assert_guided_like_oracle(pair, sgd, scale, target, **settings)


# Held at the base


@pytest.mark.parametrize("with_prior", [True, False])
def test_base(pair, with_prior):
    """B ← (1 − lr·a)·B after the optimizer's own step, A alone: without a prior on every projection."""
    model = steered(pair, "decoupled", "base", prior=pair.path)
    if not with_prior:
        config = DriftConfig(drift_scale="decoupled", drift_target="base", drift_alpha=4.0, r=4, lora_alpha=6)
        model = get_peft_model(copy.deepcopy(pair.base), config)
        assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
        assert all(p.any() for n, p in model.named_parameters() if "lora_A" in n)
        model = randomized(model)
    assert_guided_like_oracle(pair, sgd, "decoupled", "base", model=model)
    got = telemetry(model)
    assert got["guided_steps"] == 2 and ("absorbed" in got) == with_prior


def test_guide_holds_at_the_base_without_a_prior(whole):
    model = get_peft_model(copy.deepcopy(whole.base), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    model = randomized(model)
    twin, start = copy.deepcopy(model), state(model)
    guide(model, drift_scale="decoupled", drift_target="base", drift_alpha=ALPHA["decoupled"])
    train(model, sgd(model))
    train_by_oracle(twin, sgd(twin), whole.prior, "decoupled", "base", start=start)
    assert_same_update(model, twin, start)
    with pytest.raises(ValueError, match="was given no prior to steer by"):
        guide(twin)


# LoRA's own settings


def backward_with_dropout(model):
    torch.manual_seed(5)
    backward(model)


def backward_with_invocation(model):
    """The adapter acts from the tokens 3, 4 on, and in the last row not at all."""
    ids = BATCH.clone()
    for row in range(len(ids) - 1):
        ids[row, row : row + 2] = torch.tensor([3, 4])
    backward(model, ids)


LORA = {
    "dropout": {"lora_dropout": 0.3, "backward": backward_with_dropout},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "gate_proj"]},
    "some layers of all": {"layers_to_transform": [1]},
    "not some modules": {"exclude_modules": ["q_proj"]},
    "lora bias": {"lora_bias": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [8, 12]}},  # such as <think> and </think>
    "alora": {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM", "backward": backward_with_invocation},
    "velora": variant("velora_config", "VeloraConfig", num_groups=8, init_type="random"),
}


@pytest.mark.filterwarnings("ignore:.*aLoRA|.*target_parameters")
@pytest.mark.parametrize("lora", [known(name, settings) for name, settings in LORA.items()])
@two_modes
def test_settings_of_lora(pair, scale, target, lora):
    start = assert_guided_like_oracle(pair, sgd, scale, target, **LORA[lora])
    if lora == "some layers of all":
        assert {n.split("layers.")[1][0] for n in state(start)} == {"1"}
    if lora == "not some modules":
        assert not any("q_proj" in n for n in state(start))


@pytest.mark.filterwarnings("ignore:.*aLoRA")
@pytest.mark.parametrize("lora", [known(name, LORA[name]) for name in ("alora", "velora")])
def test_variants_with_the_plain_chain_rule_act_as_plain_lora(pair, lora):
    """W + s·B·A in the forward pass: of aLoRA on all tokens where the invocation comes first."""
    ids = torch.cat([torch.tensor([[3, 4]] * len(BATCH)), BATCH], 1)
    settings = {key: value for key, value in LORA[lora].items() if key != "backward"}
    model = steered(pair, **settings)
    plain = steered(pair)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    backward(model, torch.cat([BATCH, ids], 1))  # of aLoRA now on a part of them
    if lora == "alora":  # BᵀG·Aᵀ is reached from both factors' gradients; VeLoRA's of lora_A is compressed
        for layer, _ in oracle_layers(model, pair.prior):
            A, B = factors(layer)
            torch.testing.assert_close(B.T @ B.grad, A.grad @ A.T)


@pytest.mark.parametrize("target_modules", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
@pytest.mark.parametrize(
    ("scale", "target"),
    [
        ("absolute", "residual"),
        ("gradnorm", "delta"),
        ("adaptive", "factors"),
        ("decoupled", "factors"),
        ("decoupled", "base"),
    ],
)
def test_embeddings_and_heads(whole, scale, target, target_modules):
    """An embedding acts as W + s·(B·A)ᵀ, so that it is steered by Δᵀ."""
    assert_guided_like_oracle(whole, sgd, scale, target, target_modules=target_modules)


def test_weight_norms_of_embeddings_are_refused_before_anything_is_wrapped(whole):
    model, settings = copy.deepcopy(whole.base), {"target_modules": ["embed_tokens", "q_proj"], "drift_norm": "weight"}
    with pytest.raises(ValueError, match=r"drift_norm='weight' is not available .* such as embed_tokens\.weight"):
        get_peft_model(model, DriftConfig(prior=whole.path, **settings))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    get_peft_model(model, DriftConfig(prior=whole.path, drift_modules="attn", **settings))


@pytest.mark.parametrize("r", [4, 12])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:On 1 layers the prior's rank is below")
def test_the_drift_start_of_embeddings_and_heads(whole, module, r):
    model = get_peft_model(
        copy.deepcopy(whole.base), DriftConfig(prior=whole.path, r=r, target_modules=[module])
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=BATCH).logits, whole.base(input_ids=BATCH).logits)
    (layer, oracle), *rest = oracle_layers(model, whole.prior)
    A, B = factors(layer)
    assert not rest
    torch.testing.assert_close(A[:8].double(), oracle.Vh / 3**0.5)
    assert not (B[:, :8]).any()
    # Rows beyond the prior's rank start as PEFT's: of an embedding A = 0 and B random, else the other way round.
    if r > 8:
        assert A[8:].any(1).all() == (module == "lm_head") and B[:, 8:].any(0).all() == (module == "embed_tokens")
