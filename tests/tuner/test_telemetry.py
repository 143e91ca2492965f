"""What is told of the guidance, against dense numbers; and what is said loudly."""

import copy
import warnings

import pytest
import torch
from older import saves_biases
from peft import LoraConfig, get_peft_model
from reference import Layer, norm, ratio
from twin import (
    ALPHA,
    assert_same_update,
    backward,
    bias_by_oracle,
    make_whole_pair,
    oracles,
    sgd,
    state,
    steered,
    train,
    trainable,
    twin_of,
)

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.checkpoints.naming import module_kind


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole_pair(tmp_path_factory.mktemp("whole"))


def mean(numbers):
    return sum(numbers) / len(numbers)


def position(model, prior, **which):
    """{canonical name: (M, Δ_r)} with M = s·B·A or W − W_0, dense."""
    found = {}
    for name, _, oracle in oracles(model, prior, **which):
        M = oracle.adapters if isinstance(oracle, Layer) else oracle.W - oracle.W0
        found[name] = M.flatten(), oracle.delta.flatten()
    return found


def last_step(twin, prior, scale, target, **which):
    """{canonical name: (mean cosine of gradient and direction, mean ‖bias‖/‖gradient‖)}; takes the step."""
    backward(twin)
    found = {}
    for name, parameters, oracle in oracles(twin, prior, **which):
        grads = [p.grad.double() for p in parameters]
        directions, biased = oracle.directions(target), oracle.biased(*grads, ALPHA[scale], scale, target)
        cosines = [ratio(float((g * D).sum()), norm(g) * norm(D)) for g, D in zip(grads, directions, strict=True)]
        ratios = [norm(b - g) / norm(g) for b, g in zip(biased, grads, strict=True)]
        found[name] = mean(cosines), mean(ratios)
    return found


def by_kind(summary, found):
    """{"": over all, "/attn": …}"""
    kinds = {f"/{module_kind(name)}": [] for name in found}
    for name, values in found.items():
        kinds[f"/{module_kind(name)}"].append(values)
    return {kind: summary(values) for kind, values in {"": [*found.values()], **kinds}.items()}


def expected_position(found):
    def summary(pairs):
        M, delta = (torch.cat(part) for part in zip(*pairs, strict=True))
        inner = float(M @ delta)
        return {"alignment": ratio(inner, norm(M) * norm(delta)), "absorbed": inner / norm(delta) ** 2}

    return {f"{key}{kind}": value for kind, told in by_kind(summary, found).items() for key, value in told.items()}


def expected_step(found):
    def summary(pairs):
        cosines, ratios = zip(*pairs, strict=True)
        return {"gradient_cosine": mean(cosines), "bias_ratio": mean(ratios)}

    return {f"{key}{kind}": value for kind, told in by_kind(summary, found).items() for key, value in told.items()}


BESIDE = {"bias": "all", "modules_to_save": ["norm"]}


@pytest.mark.parametrize(
    ("scale", "target", "settings"),
    [("adaptive", "residual", {"drift_rank": 3}), ("absolute", "factors", {}), ("gradnorm", "residual", BESIDE)],
)
def test_against_dense_numbers(whole, scale, target, settings):
    model = steered(whole, scale, target, target_modules=["q_proj", "up_proj"], **settings)
    twin, start = twin_of(whole, model), state(model)
    which = {"start": start, "rank": settings.get("drift_rank")}
    assert telemetry(model) == pytest.approx(
        {"guided_steps": 0} | expected_position(position(model, whole.prior, **which))
    )
    train(model, sgd(model), 2)
    optimizer = sgd(twin)
    for _ in range(2):
        optimizer.zero_grad()
        found = last_step(twin, whole.prior, scale, target, **which)
        bias_by_oracle(twin, whole.prior, scale, target, **which)
        optimizer.step()
    expected = {"guided_steps": 2} | expected_step(found) | expected_position(position(model, whole.prior, **which))
    kinds = {"attn", "mlp", "norm", "bias"} if settings is BESIDE else {"attn", "mlp"}
    assert {key.partition("/")[2] for key in expected} == {"", *kinds}
    assert telemetry(model) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("how", ["guide", "prior"])
def test_of_models_wrapped_elsewhere(pair, how):
    model = twin_of(pair, steered(pair))
    if how == "guide":
        guide(model, pair.prior, drift_rank=3, drift_alpha=0.5)
    train(model, sgd(model))
    found = telemetry(model, pair.prior if how == "prior" else None)
    assert how == "guide" or found == telemetry(model, pair.path) == telemetry(model, str(pair.path))
    expected = expected_position(position(model, pair.prior, rank=None if how == "prior" else 3))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["guided_steps"] == (0 if how == "prior" else 2)
    assert ("bias_ratio" in found) == ("gradient_cosine/mlp" in found) == (how == "guide")


def test_of_an_adapter_that_is_not_active(pair):
    model = steered(pair)
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("plain")
    with pytest.raises(
        ValueError, match=r"No active adapter is steered, but 'default' is: call model.set_adapter\('def"
    ):
        telemetry(model)


def test_with_a_prior_the_steps_are_counted_too(pair):
    model = steered(pair)
    train(model, sgd(model))
    assert telemetry(model, pair.prior)["guided_steps"] == telemetry(model)["guided_steps"] == 2


def test_of_full_training(whole):
    model = copy.deepcopy(whole.base).double().train()
    start = state(model)
    guide(model, whole.prior, drift_scale="decoupled", drift_target="factors", drift_alpha=2.0)
    assert telemetry(model) == {"guided_steps": 0} | dict.fromkeys(
        expected_position(position(model, whole.prior, start=start)), 0
    )
    train(model, sgd(model))
    expected = expected_position(position(model, whole.prior, start=start))
    assert telemetry(model) == pytest.approx({"guided_steps": 2} | expected, rel=1e-4)  # no numbers of a gradient bias
    assert {f"absorbed/{kind}" for kind in ("attn", "mlp", "norm", "bias", "head", "embed")} <= expected.keys()
    model = guide(copy.deepcopy(whole.base), whole.prior, drift_target="delta")
    assert telemetry(model) == {"guided_steps": 0}  # it needs no W_0, so that nobody knows how far W has come


def test_of_a_start_and_of_a_plain_model(pair):
    model = get_peft_model(copy.deepcopy(pair.base), DriftConfig(prior=pair.path, r=4))
    assert set(telemetry(model).values()) == {0}
    assert not any("gradient" in key or "ratio" in key or "repeated" in key for key in telemetry(model))
    with pytest.raises(ValueError, match=r"No layer of this model is steered.*guide\(model, prior\)"):
        telemetry(twin_of(pair, model))
    with pytest.raises(ValueError, match=r"No active LoRA layer of this model has a Δ in .*: leave prior out for what"):
        telemetry(guide(copy.deepcopy(pair.base).requires_grad_(True), pair.prior, drift_target="delta"), pair.prior)


# What is said loudly


@saves_biases
def test_the_count_of_parameters_says_what_is_steered(pair, whole, capsys):
    model = steered(pair, prior=str(pair.folder / "attn.safetensors"), target_modules=["q_proj", "up_proj"])
    model.print_trainable_parameters()
    counted, told = capsys.readouterr().out.splitlines()
    assert counted.startswith("trainable params: ") and told == "steered modules: 2 of 4 adapted"
    steered(whole, bias="lora_only").print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[1] == "steered modules: 14 of 14 adapted || steered tensors: 14"
    model.add_adapter("second", DriftConfig(prior=pair.path, r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[1] == "steered modules: 2 of 4 adapted"
    plain = get_peft_model(copy.deepcopy(pair.base), LoraConfig(target_modules=["q_proj"]))
    plain.print_trainable_parameters()
    assert len(capsys.readouterr().out.splitlines()) == 1
    guide(plain, pair.prior)
    plain.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[1] == "steered modules: 2 of 2 adapted"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_steps_on_the_same_gradients(pair, set_to_none):
    """The bias is not added again; new gradients in the old tensors are no repetition."""
    model = steered(pair, "gradnorm")
    twin, start = twin_of(pair, model), state(model)
    optimizer, plain = sgd(model), sgd(twin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps in (1, 3, 2):
            optimizer.zero_grad(set_to_none)
            plain.zero_grad(set_to_none)
            backward(model), backward(twin)
            bias_by_oracle(twin, pair.prior, "gradnorm", "residual")
            for _ in range(steps):
                optimizer.step(), plain.step()
            assert telemetry(model).get("repeated_steps", 0) == {1: 0, 3: 2, 2: 3}[steps]
    assert_same_update(model, twin, start)
    assert sum("called twice on the same gradients" in str(w.message) for w in caught) == 1


def step_by_hand(model):
    backward(model)
    with torch.no_grad():
        for p in trainable(model):
            p -= 0.05 * p.grad


def step_guided(model):
    train(model, sgd(model))


@pytest.mark.parametrize(
    ("trained", "settings", "warns"),
    [
        (step_by_hand, {}, True),
        (step_by_hand, {"drift_alpha": 0.0, "drift_alpha_pattern": {"q_proj": 1.0}}, True),
        (step_by_hand, {"drift_alpha": 0.0}, False),
        (step_guided, {}, False),
        (id, {}, False),
    ],
)
def test_saving_says_when_the_guidance_never_ran(pair, tmp_path, trained, settings, warns):
    model = get_peft_model(copy.deepcopy(pair.base), DriftConfig(prior=pair.path, r=4, **settings)).train()
    trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    assert sum("the guidance never ran" in str(w.message) for w in caught) == warns
