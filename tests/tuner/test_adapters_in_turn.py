"""Adapters that come and go while one optimizer trains on: who is guided, and how many steps are counted of each."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from twin import backward, each_scale, randomized, sgd, steered, train, trainable

from drift_peft import DriftConfig, telemetry
from drift_peft.keeping.steps import _moves

ADAPTER = {"r": 4, "lora_alpha": 6, "drift_alpha": 0.8}


def steps_of(model):
    return telemetry(model)["guided_steps"]


def with_second(pair, **settings):
    """A guided adapter, and another one that is not active."""
    model = steered(pair, **settings)
    config = copy.deepcopy(model.peft_config["default"])
    config.drift_steps = 0
    model.add_adapter("second", config)
    return model


# Whose steps


def test_an_adapter_in_place_of_another_one_counts_anew(pair):
    model = steered(pair)
    optimizer = sgd(model)
    train(model, optimizer, steps=3)
    assert steps_of(model) == 3
    model.delete_adapter("default")
    model.add_adapter("default", DriftConfig(prior=pair.path, drift_warmup_steps=2, drift_decay_steps=3, **ADAPTER))
    model.set_adapter("default")
    optimizer.add_param_group({"params": trainable(model)})
    train(model, optimizer, steps=2)
    assert steps_of(model) == 2 and telemetry(model)["bias_ratio"] > 0


def test_models_whose_adapters_are_called_alike_count_their_own(pair):
    first, second = steered(pair), steered(pair)
    optimizer = torch.optim.SGD([*trainable(first), *trainable(second)], lr=0.05)
    train(first, optimizer, steps=3)
    train(second, optimizer, steps=1)
    assert (steps_of(first), steps_of(second)) == (3, 1)
    group = optimizer.param_groups[0]
    assert (group["drift_steps.default"], group["drift_steps.default.1"]) == (3, 1)
    again = [steered(pair), steered(pair)]
    resumed = torch.optim.SGD([p for model in again for p in trainable(model)], lr=0.05)
    resumed.load_state_dict(optimizer.state_dict())
    for model in again:
        train(model, resumed, steps=1)
    assert [steps_of(model) for model in again] == [4, 2]


@pytest.mark.parametrize("parts", [1, 2])
def test_training_goes_back_to_an_earlier_step(pair, parts):
    model = steered(pair)
    shares = trainable(model)[0::2], trainable(model)[1::2]
    optimizers = [torch.optim.Adam(p, lr=0.01) for p in (shares if parts == 2 else [trainable(model)])]

    def steps(number):
        for _ in range(number):
            model.zero_grad()
            backward(model)
            for optimizer in optimizers:
                optimizer.step()

    steps(2)
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    steps(4)
    assert steps_of(model) == 6
    for optimizer, earlier in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(earlier)
    steps(1)
    assert steps_of(model) == 3
    steps(1)
    assert steps_of(model) == 4


# Who is guided


@pytest.mark.parametrize(
    ("scale", "target"), [("absolute", "residual"), ("decoupled", "factors"), ("adaptive", "residual")]
)
def test_an_adapter_that_is_not_active_stays(pair, scale, target):
    model = with_second(pair, scale=scale, target=target)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.05)
    train(model, optimizer, steps=1)
    model.set_adapter("second")
    idle = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        backward(model)
        optimizer.step()
    assert all(torch.equal(p, idle[n]) for n, p in model.named_parameters() if n in idle)
    assert steps_of(model) == 3
    model.set_adapter("default")
    assert steps_of(model) == 1


@each_scale
def test_one_step_moves_several_adapters_in_turn(pair, scale, target):
    """The last one alone is active at the step; each is guided as by a step of its own."""
    model = randomized(with_second(pair, scale=scale, target=target))
    alone = {name: copy.deepcopy(model) for name in ("default", "second")}
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.05)
    for name, other in alone.items():
        model.set_adapter(name)
        backward(model)
        other.set_adapter(name)
        train(other, sgd(other), steps=1)
    optimizer.step()
    for name, other in alone.items():
        weights = dict(other.named_parameters())
        moved = [(p, weights[n]) for n, p in model.named_parameters() if f".{name}." in n]
        assert moved and all(torch.equal(p, expected) for p, expected in moved)
        model.set_adapter(name)
        assert steps_of(model) == 1


@pytest.mark.parametrize("ends", ["another is active", "disabled"])
def test_an_adapter_is_idle_when_it_is_stepped(pair, ends):
    model = with_second(pair)
    twin, optimizer = copy.deepcopy(model), sgd(model)
    train(twin, sgd(twin), steps=1)
    backward(model)
    if ends == "disabled":
        with model.disable_adapter():
            optimizer.step()
    else:
        model.set_adapter("second")
        optimizer.step()
        model.set_adapter("default")
    assert steps_of(model) == 1
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), trainable(twin), strict=True))


@pytest.mark.parametrize(
    ("gradient", "moves"),
    [([0.0, 0.0], False), ([0.0, 1e-30], True), ([0.0, -1.0], True), ([torch.nan, 0.0], True)],
)
def test_a_frozen_parameter_is_moved_by_any_entry_of_its_gradient(gradient, moves):
    gradient = torch.tensor(gradient)
    assert _moves(gradient) == _moves(gradient[:, None].to_sparse(1)) == moves


# What is said


def test_nothing_is_said_of_a_reference_that_was_copied(pair, tmp_path):
    """As TRL's trainers of preferences make one."""
    model = steered(pair)
    train(model, sgd(model))
    model.add_adapter("ref", model.peft_config["default"])
    weights = dict(model.named_parameters())
    for name in weights:
        if ".default." in name:
            weights[name.replace(".default.", ".ref.")].data.copy_(weights[name].data)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never ran")
        model.save_pretrained(tmp_path)


def test_an_idle_adapter_that_was_trained_unguided_is_said(pair, tmp_path):
    model = with_second(pair)
    model.set_adapter("second")
    for p in trainable(model):  # by an optimizer that does not call the hooks
        p.data += 0.1
    model.set_adapter("default")
    train(model, sgd(model), steps=1)
    with pytest.warns(UserWarning, match="The adapter 'second' was trained, but the guidance never ran"):
        model.save_pretrained(tmp_path)


def test_an_average_of_a_guided_model_is_not_called_plain(pair, tmp_path):
    model = get_peft_model(copy.deepcopy(pair.base), DriftConfig(prior=pair.path, **ADAPTER)).train()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = sgd(model)
    for _ in range(2):
        train(model, optimizer, steps=1)
        averaged.update_parameters(model)
    with pytest.warns(UserWarning, match="never ran: .* Or it is a copy of the model .* an average of its weights"):
        averaged.module.save_pretrained(tmp_path)


def test_a_further_adapter_is_told_how_it_is_loaded_guided(pair, tmp_path):
    model = steered(pair)
    train(model, sgd(model))
    model.save_pretrained(tmp_path)
    plain = steered(pair)
    plain.load_adapter(tmp_path, "two", is_trainable=True)
    plain.set_adapter("two")
    with pytest.warns(UserWarning, match=r"load it with model.add_adapter\('two', DriftConfig.from_pretrained"):
        train(plain, sgd(plain), steps=1)
    other = steered(pair)
    other.add_adapter("two", DriftConfig.from_pretrained(tmp_path))
    other.load_adapter(tmp_path, "two", is_trainable=True)
    other.set_adapter("two")
    train(other, sgd(other), steps=1)
    assert steps_of(other) == 3


# In 16 bits


@pytest.mark.parametrize(
    ("dtype", "lr", "alpha", "told"),
    [
        (torch.bfloat16, 1e-3, 1.0, True),
        (torch.bfloat16, 1e-4, 30.0, True),
        (torch.bfloat16, 1e-2, 1.0, False),
        (torch.float32, 1e-3, 1.0, False),
        (torch.bfloat16, 1e-3, 0.0, False),
    ],
)
def test_a_pull_that_is_rounded_away_is_said(pair, dtype, lr, alpha, told):
    model = steered(pair, "decoupled", "factors", dtype=dtype, drift_alpha=alpha)
    optimizer = sgd(model, lr=lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, end_factor=1.0, total_iters=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer)
        scheduler.step()
        train(model, optimizer)
    found = [w for w in caught if "round most of that away: train them in float32" in str(w.message)]
    assert len(found) == told
