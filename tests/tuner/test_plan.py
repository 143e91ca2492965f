"""plan.py: what was looked up serves as long as nothing changes, and every change is noticed at the next step."""

import copy
import gc
import threading
import weakref
from functools import cache

import pytest
import torch
from pairs import Pair
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from twin import each_scale, sgd, state, steered, train

import drift_peft.tuner.step
from drift_peft import guide, telemetry
from drift_peft.tuner.plan import Plan
from drift_peft.tuner.steered import STEERED, Steered

STEPS = 2


@pytest.fixture
def looked_up(monkeypatch):
    """The plans that were made, in the order of making."""
    made, init = [], Plan.__init__

    def remember(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Plan, "__init__", remember)
    return made


def layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def forget_plans():
    drift_peft.tuner.step._PLANS.clear()


@each_scale
def test_one_look_serves_all_steps(pair, looked_up, scale, target):
    model, others = steered(pair, scale, target), [steered(pair) for _ in range(3)]
    train(model, sgd(model), 4)
    assert len(looked_up) == 1
    other = sgd(others[0])
    train(others[0], other, 2)
    train(others[0], other, 2)
    assert len(looked_up) == 2


@pytest.fixture
def asked(monkeypatch):
    """Of what is steered, what was asked whether it is among an optimizer's parameters, in the order of asking."""
    calls, among = [], Steered.among
    monkeypatch.setattr(Steered, "among", lambda self, parameters: calls.append(self) or among(self, parameters))
    return calls


def test_other_models_are_looked_at_once(pair, asked):
    """Whatever begins and ceases to have a gradient, and whatever is wrapped and freed meanwhile."""
    model, others = steered(pair), [steered(pair) for _ in range(3)]
    optimizer, first = sgd(model), layers(model)[0].lora_A["default"].weight
    train(model, optimizer, 1)
    mine = {id(layer.drift_peft["default"]) for layer in layers(model)}
    assert len({id(s) for s in asked}) >= 4 * len(mine)
    others.append(steered(pair))
    train(model, optimizer, 1)
    asked.clear()
    for step in range(4):
        first.requires_grad_(step % 2 == 0)
        first.grad = None
        train(model, optimizer, 1)
    assert asked and {id(s) for s in asked} <= mine  # the new one was looked at when it came
    asked.clear()
    others.append(steered(pair))
    del others[0]
    train(model, optimizer, 2)
    assert {id(s) for s in asked} - mine == {id(layer.drift_peft["default"]) for layer in layers(others[-1])}


def test_what_begins_to_be_steered_between_two_steps_is_noticed(pair):
    model, other = steered(pair), steered(pair, prior=str(pair.path)).base_model.unload()
    other.requires_grad_(True)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    train(model, optimizer, 2)
    guide(other, pair.prior, drift_target="delta")
    steered(pair)
    train(other, optimizer, 1)
    assert telemetry(other)["guided_steps"] == 1 and telemetry(model)["guided_steps"] == 2


def freeze(model, optimizer):
    layers(model)[0].lora_A["default"].weight.requires_grad_(False).grad = None


def freeze_more(model, optimizer):
    for layer in layers(model)[:5]:
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.requires_grad_(False)


def move(model, optimizer):
    model.to(torch.float32)


def move_some(model, optimizer):
    for layer in layers(model)[::2]:
        layer.to(torch.float32)
        layer.base_layer.to(torch.float64)


def replace(model, optimizer):
    """As FSDP2 does: other Parameter objects in the same modules."""
    (group,) = optimizer.param_groups
    for layer in layers(model):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            new = torch.nn.Parameter(factor.weight.detach().clone())
            group["params"] = [new if p is factor.weight else p for p in group["params"]]
            factor.weight = new


def replace_a_module(model, optimizer):
    (group,) = optimizer.param_groups
    adapters = layers(model)[2].lora_B
    old, adapters["default"] = adapters["default"], copy.deepcopy(adapters["default"])
    group["params"] = [adapters["default"].weight if p is old.weight else p for p in group["params"]]


def scale_up(model, optimizer):
    for layer in layers(model)[::2]:
        layer.set_scale("default", 3.0)


def activate_another(model, optimizer):
    model.add_adapter(
        "other", LoraConfig(r=2, lora_alpha=4, target_modules=model.peft_config["default"].target_modules)
    )
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["other"].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    model.base_model.set_adapter(["default", "other"])


def activate_another_here_and_there(model, optimizer):
    activate_another(model, optimizer)
    for layer in layers(model)[::2]:
        layer.delete_adapter("other")
        layer.set_adapter("default")


def deactivate(model, optimizer):
    activate_another(model, optimizer)
    train(model, optimizer, 1)
    model.delete_adapter("other")


def add_to_the_optimizer(model, optimizer):
    (group,) = optimizer.param_groups
    optimizer.param_groups[0]["params"], rest = group["params"][:10], group["params"][10:]
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": rest, "lr": 0.02})


def strengthen(model, optimizer):
    layers(model)[0].drift_peft["default"].config.drift_alpha_pattern = {r"layers\.1\..*": 0.1}


CHANGES = [freeze, freeze_more, move, move_some, replace, replace_a_module, scale_up, activate_another, deactivate]
CHANGES += [activate_another_here_and_there, add_to_the_optimizer, strengthen]


@pytest.fixture(scope="module")
def ended(pair):
    """Where training ends that is changed after half of its steps, and whose plans are made afresh before each."""

    def run(scale, target, change=None, afresh=False):
        torch.manual_seed(0)
        model = steered(pair, scale, target)
        optimizer = sgd(model)
        for part in range(2):
            for _ in range(STEPS):
                if afresh:
                    forget_plans()
                train(model, optimizer, 1)
            if change and part == 0:
                change(model, optimizer)
        return state(model)

    return cache(run)


BY_GRADIENT = freeze, replace, move  # the plan is the same for all modes, so that a few changes show it
SEEN = [("decoupled", "factors", change) for change in CHANGES]
SEEN += [("adaptive", "residual", change) for change in BY_GRADIENT]


@pytest.mark.parametrize(("scale", "target", "change"), SEEN)
def test_a_change_between_steps_is_noticed(ended, scale, target, change):
    """To the last bit what a look at every step gives, and not what it was without the change."""
    kept, looked = (ended(scale, target, change, afresh) for afresh in (False, True))
    unchanged = ended(scale, target)
    assert kept.keys() == looked.keys() and all(torch.equal(kept[name], looked[name]) for name in kept)
    same = kept.keys() == unchanged.keys() and all(torch.equal(kept[name], unchanged[name]) for name in kept)
    assert same == (change in (replace, replace_a_module))  # which go on with the same numbers


def test_ranks_that_were_padded_are_noticed(pair):
    model = steered(pair)
    optimizer = sgd(model)
    train(model, optimizer, 1)
    A, B = (getattr(layers(model)[0], f"lora_{factor}")["default"].weight for factor in "AB")
    A.data, B.data = torch.cat([A.data, A.data[:2]]), torch.cat([B.data, B.data[:, :2]], 1)
    with pytest.raises(RuntimeError, match="has rank 4 but 6 rows"):
        train(model, optimizer, 1)


def test_settings_given_anew_are_noticed(pair, looked_up):
    model = steered(pair, prior=str(pair.path)).base_model.unload()
    model.requires_grad_(True)
    guide(model, pair.prior, drift_target="delta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    guide(model, pair.prior, drift_target="delta", drift_alpha=0.0)
    train(model, optimizer, 2)
    assert len(looked_up) == 2 and looked_up[0]() is None and not looked_up[1]().groups


def test_an_optimizer_keeps_no_model_alive(pair):
    model = steered(pair, "adaptive", "residual", drift_norm="weight")
    optimizer = sgd(model)
    train(model, optimizer, 2)
    seen = layers(model)[0].drift_peft["default"]
    refs = [weakref.ref(each) for each in (model, layers(model)[0], seen, seen.stack, seen.capture)]
    del model, seen
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5 and optimizer.param_groups
    optimizer.step()  # nothing is left to guide


def test_a_layer_that_is_gone_is_no_longer_asked(pair):
    """Before the garbage collection, what steers it by the norm of the weight may outlive it."""
    model = steered(pair, "adaptive", "residual", drift_norm="weight")
    optimizer = sgd(model)
    train(model, optimizer, 1)
    gc.collect()
    gc.disable()
    try:
        model.base_model.model.model.layers[0].self_attn.q_proj = torch.nn.Identity()
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError, match="saw no backward pass"):  # of the layers that are left
            optimizer.step()
    finally:
        gc.enable()


def test_a_step_within_a_step_keeps_the_plan(pair, looked_up):
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = steered(pair)
    train(model, Outer([p for p in model.parameters() if p.requires_grad], lr=0.01), 4)
    assert len(looked_up) == 1


def test_a_freed_optimizer_takes_its_plan_along(pair, looked_up):
    model = steered(pair)
    optimizer = sgd(model)
    train(model, optimizer, 1)
    assert looked_up[0]() is not None
    del optimizer
    gc.collect()
    assert looked_up[0]() is None


def test_models_are_wrapped_while_another_one_trains(pair: Pair):
    """A step does not read what another thread writes."""
    model, problems, done = steered(pair), [], threading.Event()
    optimizer = sgd(model)

    def wrap():
        try:
            while not done.is_set():
                steered(pair)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=wrap) for _ in range(2)]
    before = STEERED.version
    for thread in threads:
        thread.start()
    try:
        steps = 0
        while steps < 20 or STEERED.version < before + 100:  # both have been at it
            train(model, optimizer, 1)
            steps += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems
