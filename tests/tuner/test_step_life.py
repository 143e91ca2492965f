"""The steering of a model that is copied, freed, cast, unloaded or given further adapters."""

import copy
import gc
import importlib
import weakref

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from twin import (
    ALPHA,
    assert_guided_like_oracle,
    assert_same_update,
    backward,
    bias_by_oracle,
    pickled,
    randomized,
    sgd,
    state,
    steered,
    train,
    train_by_oracle,
    twin_of,
)

import drift_peft.tuner.step
from drift_peft import DriftConfig, guide, telemetry
from drift_peft.tuner.steered import STEERED, Stack

# The life of a model


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("after", [0, 1])
def test_copies_stay_steered_and_so_do_their_originals(pair, how, after):
    model = steered(pair)
    train(model, sgd(model), after)
    twin, start = twin_of(pair, model), state(model)
    clone = how(model)
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    for m in (clone, model):
        train(m, sgd(m))
        assert_same_update(m, twin, start)
        assert telemetry(m)["guided_steps"] == 2 + after
    del model
    gc.collect()
    start = state(clone)
    train(clone, sgd(clone))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    assert_same_update(clone, twin, start)


def test_a_deleted_model_is_freed(pair):
    gc.collect()
    before = len(STEERED)
    model = steered(pair)
    train(model, sgd(model))
    assert len(STEERED) == before + 14
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    refs = [weakref.ref(x) for x in (model, layer, layer.lora_A["default"].weight, layer.drift_peft["default"])]
    del model, layer
    gc.collect()
    assert [r() for r in refs] == [None] * 4
    assert len(STEERED) == before


def test_reloading_the_module_does_not_guide_twice(pair):
    model = steered(pair)
    twin, start = twin_of(pair, model), state(model)
    for _ in range(2):
        importlib.reload(drift_peft.tuner.step)
    train(model, sgd(model))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    assert_same_update(model, twin, start)
    assert_guided_like_oracle(pair, sgd)  # and so is a model that is wrapped now


def test_after_a_change_of_dtype(pair):
    model = steered(pair, dtype=torch.float32)
    twin = twin_of(pair, model)
    for dtype in (torch.float32, torch.float64, torch.float32):
        start = state(model.to(dtype))
        train(model, sgd(model))
        train_by_oracle(twin.to(dtype), sgd(twin), pair.prior, "adaptive", "residual")
        assert_same_update(model, twin, start, 1e-4)


def test_the_stack_of_the_prior_is_kept_until_the_device_changes(pair):
    steered_here = [m.drift_peft["default"] for m in steered(pair).modules() if isinstance(m, LoraLayer)][:1]
    stack = Stack.of(steered_here, torch.device("cpu"))
    assert Stack.of(steered_here, torch.device("cpu")) is stack
    assert Stack.of(steered_here, torch.device("meta")).prior["U"].device.type == "meta"


def test_unloading_leaves_the_base_to_itself(pair):
    model = steered(pair)
    base = model.unload()
    base.requires_grad_(True)
    plain = copy.deepcopy(pair.base).double()
    for m in (base, plain):
        train(m.train(), torch.optim.SGD(m.parameters(), lr=0.05), 1)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), plain.parameters(), strict=True))


def test_scaling_is_read_at_the_step(pair):
    model = steered(pair, "gradnorm")
    twin = twin_of(pair, model)
    for factor in (1, 3, 0.5):
        for m in (model, twin):
            for module in m.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale("default", factor)
        start = state(model)
        train(model, sgd(model))
        train_by_oracle(twin, sgd(twin), pair.prior, "gradnorm", "residual")
        assert_same_update(model, twin, start)


@pytest.mark.parametrize("scale", ["adaptive", "decoupled"])
def test_the_strength_is_read_at_the_step(pair, scale):
    """As scale and target are: `model.peft_config` is where the settings of a DriftConfig are changed."""
    target = "factors" if scale == "decoupled" else "residual"
    model = steered(pair, scale, target)
    twin, config = twin_of(pair, model), model.peft_config["default"]
    optimizer, plain = sgd(model), sgd(twin)
    for strength in (ALPHA[scale], 0.1, 0.0, 0.3):
        config.drift_alpha, start = strength, state(model)
        train(model, optimizer, 1)
        train_by_oracle(twin, plain, pair.prior, scale, target, 1, alpha=lambda name, step, a=strength: a)
        assert_same_update(model, twin, start)
    config.drift_alpha, config.drift_alpha_pattern, start = 0.0, {r"layers\.1\..*": 0.5}, state(model)
    train(model, optimizer, 1)
    given = {"alpha": lambda name, step: 0.5 if "layers.1." in name else 0.0}
    train_by_oracle(twin, plain, pair.prior, scale, target, 1, **given)
    assert_same_update(model, twin, start)


# Several adapters


def with_second(model, config):
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    model = randomized(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    return model


@pytest.mark.parametrize("both_steered", [False, True])
@pytest.mark.parametrize("scale", ["absolute", "gradnorm", "adaptive"])
def test_the_residual_subtracts_all_active_adapters(pair, scale, both_steered):
    second = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "gate_proj"]}
    mode = {"drift_scale": scale, "drift_alpha": ALPHA[scale]}
    model = steered(pair, scale)
    twin = with_second(twin_of(pair, model), LoraConfig(**second))
    if both_steered:
        with_second(model, DriftConfig(prior=pair.path, **mode, **second))
    else:
        model = guide(copy.deepcopy(twin), pair.prior, "default", **mode)
    start = state(model)
    train(model, sgd(model), 1)
    backward(twin)
    for adapter in ("default", "second")[: 1 + both_steered]:
        bias_by_oracle(twin, pair.prior, scale, "residual", adapter=adapter)
    sgd(twin).step()
    assert len(start) == 28 + 8
    assert_same_update(model, twin, start)


def test_a_deleted_adapter_is_not_steered(pair):
    model, other = steered(pair), steered(pair)
    with_second(model, DriftConfig(prior=pair.path, r=2))
    model.delete_adapter("default")
    model.set_adapter("second")
    twin, start = twin_of(pair, other), state(other)
    train(model, sgd(model), 1)
    train(other, sgd(other), 1)  # any model of the process
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual", 1)
    assert_same_update(other, twin, start)
    assert telemetry(model)["guided_steps"] == 1
