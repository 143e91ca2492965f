"""When a step is guided and when it is not, and what is measured of it, on layers with given gradients."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from reference import schedule
from steered_layers import (
    OUT,
    SCALES,
    Discarding,
    Layers,
    Tensors,
    assert_steps_as_the_oracle,
    close,
    forward,
    settings,
    step,
    weighted,
)
from torch import nn

from drift_peft.tuner import step as step_module
from drift_peft.tuner.batches import bias_gradients, groups_of
from drift_peft.tuner.sharding import Storage
from drift_peft.tuner.steered import (
    Stack,
    lora_factor,
)
from drift_peft.tuner.step import _engine_step

# When


@pytest.mark.parametrize(("scale", "target"), [("absolute", "residual"), ("decoupled", "factors")])
def test_the_strength_grows_and_decays_and_is_gone(scale, target):
    model = Layers(settings(scale, target, drift_warmup_steps=2, drift_decay_steps=3))
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    for number, strength in enumerate([0, 0.5, 1, 2 / 3, 1 / 3, 0, 0]):
        assert strength == pytest.approx(schedule(number, 2, 3))
        expected = model.grads(number).expected(0.7 * strength, scale, target, 0.1)
        step(model, optimizer=optimizer)
        for p, value in zip(model.trained(), expected, strict=True):
            close(p, value)
        assert model.config.drift_steps == number + 1
        assert optimizer.param_groups[0]["drift_steps.default"] == number + 1


@pytest.mark.parametrize("config_steps", [0, 1, 4, torch.tensor(1.0)])
def test_the_place_in_the_schedule_comes_back_with_the_optimizer(config_steps):
    model = Layers(settings("absolute", drift_warmup_steps=10))
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    optimizer.param_groups[0]["drift_steps.default"] = 3
    model.config.drift_steps = config_steps
    expected = model.expected(0.7 * 3 / 10, "absolute", "residual", 0.1)
    step(model, optimizer=optimizer)
    assert model.config.drift_steps == 4
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value, 1e-7)


def test_several_optimizers_make_one_iteration():
    model = Layers(settings("absolute", drift_warmup_steps=4))
    parts = [torch.optim.SGD(model.trained()[i : i + 2], lr=0.1) for i in (0, 2, 4)]
    for iteration in range(3):
        expected = model.grads(iteration).expected(0.7 * iteration / 4, "absolute", "residual", 0.1)
        for optimizer in parts:
            optimizer.step()
        for p, value in zip(model.trained(), expected, strict=True):
            close(p, value)
        assert model.config.drift_steps == iteration + 1
        assert [o.param_groups[0]["drift_steps.default"] for o in parts] == [iteration + 1] * 3


def test_the_same_gradients_are_biased_once():
    model = Layers(settings("gradnorm"))
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    step(model, optimizer=optimizer)
    biased = [p.grad.clone() for p in model.trained()]
    with pytest.warns(UserWarning, match="twice on the same gradients: they are biased toward the expert once"):
        step(model, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer=optimizer)
    assert model.config.repeated_steps == 2
    assert all(torch.equal(p.grad, g) for p, g in zip(model.trained(), biased, strict=True))
    for p in model.trained():
        p.grad.mul_(1)  # the same tensor, written again
    step(model, optimizer=optimizer)
    assert model.config.repeated_steps == 2
    assert not any(torch.equal(p.grad, g) for p, g in zip(model.trained(), biased, strict=True))


def test_gradients_that_are_written_past_autograds_eyes_are_biased():
    """`.data` raises no version: copies from a flat buffer, and what projects gradients, write so."""
    model = Layers(settings("gradnorm"))
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    for number in range(3):
        fresh = [torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) for p in model.trained()]
        for p, gradient in zip(model.trained(), fresh, strict=True):
            p.grad.data.copy_(gradient)
        expected = model.expected(0.7, "gradnorm", "residual", 0.1)
        step(model, optimizer=optimizer)
        for p, value in zip(model.trained(), expected, strict=True):
            close(p, value)
    assert model.config.repeated_steps == 0


def test_gradients_that_are_cast_between_two_steps_are_still_biased_once():
    model = Layers(settings("gradnorm"), dtype=torch.float32)
    optimizer = torch.optim.SGD(model.trained(), lr=0.0)
    step(model, optimizer=optimizer)
    model.double()
    with pytest.warns(UserWarning, match="twice on the same gradients"):
        step(model, optimizer=optimizer)


def test_each_optimizers_own_gradients_are_biased_once():
    model = Layers(settings("gradnorm"))
    A, B = (torch.optim.SGD(model.trained()[i::2], lr=0.0) for i in (0, 1))
    A.step()
    B.step()
    biased = [p.grad.clone() for p in model.trained()]
    with pytest.warns(UserWarning, match="twice on the same gradients"):
        A.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.trained(), biased, strict=True))


@pytest.mark.parametrize("kind", [Layers, Tensors])
@pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])
def test_a_step_within_autocast_is_as_exact_as_outside(kind, scale, target):
    if kind is Tensors and scale == "decoupled":
        target = "base"
    outside, inside = (kind(settings(scale, target), dtype=torch.float32) for _ in range(2))
    step(outside)
    with torch.autocast("cpu", torch.bfloat16):
        step(inside)
    for p, q in zip(outside.trained(), inside.trained(), strict=True):
        assert torch.equal(p, q)


def test_a_decoupled_step_past_its_target_is_told_of():
    model = Layers(settings("decoupled", "factors"))
    with pytest.warns(UserWarning, match=r"lr·drift_alpha of the way .* more than 1 here"):
        step(model, optimizer=torch.optim.SGD(model.trained(), lr=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer=torch.optim.SGD(model.trained(), lr=1.0))


def test_a_step_that_discards_gradients_is_followed_by_what_is_left():
    model = Layers(settings("decoupled", "factors"))
    expected = model.expected(0.7, "decoupled", "factors", 0.1)[:2]
    expected += [p.detach() - 0.1 * p.grad for p in model.trained()[2:]]
    Discarding(model.trained()).step()
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value)


def test_maximize_is_refused():
    model = Layers(settings())
    groups = [{"params": model.trained()[:1]}, {"params": model.trained()[1:], "maximize": True}]
    with pytest.raises(RuntimeError, match="maximize=True moves against the guidance: negate the loss"):
        torch.optim.SGD(groups, lr=0.1).step()
    for s in model.steered:
        s.release()
    torch.optim.SGD(groups, lr=0.1).step()  # nobody is guided


# drift_norm="weight"


@pytest.mark.parametrize("target", ["residual", "delta"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1, 1e-4])  # of Δ: a millionth of it is nothing, however small it is
def test_norms_of_the_weight_gradient(scale, target, size):
    model = weighted(target, scale, count=2)
    for i, w in enumerate(model.prior):
        model.prior[i] = dataclasses.replace(w, S=size * w.S)
        model.steer(i)
    expected = []
    for layer, oracle, G in zip(model.layers, [*model.oracles()], forward(model), strict=True):
        X, plain = oracle.weight_direction(target), [lora_factor(layer, f, "default").grad.clone() for f in "AB"]
        share = min(1, X.norm() / oracle.delta.norm()) if target == "residual" else 1
        cosine = (G * X).sum() / (G.norm() * X.norm())
        c = {
            "absolute": 1,
            "gradnorm": share * G.norm() / X.norm(),
            "adaptive": share * (1 + cosine) / 2 * G.norm() / X.norm(),
        }[scale]
        expected += [g - 0.7 * c * D for g, D in zip(plain, oracle.directions(target), strict=True)]
    step(model, 0.0)
    for p, g in zip(model.trained(), expected, strict=True):
        close(p.grad, g, 1e-5)  # the sums are fp32


def test_weight_norms_that_are_not_to_be_had():
    model = weighted()
    forward(model)
    groups = groups_of(model.steered, {id(p) for p in model.trained()[::2]})
    with pytest.raises(RuntimeError, match="needs lora_B to be trained"):
        bias_gradients(groups)
    elsewhere = groups_of(model.steered, {*map(id, model.trained())}, Storage())
    with pytest.raises(RuntimeError, match="not available under FSDP and DeepSpeed"):
        bias_gradients(elsewhere)
    several = weighted(count=1, others=["second"])
    forward(several)
    with pytest.raises(RuntimeError, match="not available while several adapters are active"):
        step(several)
    with pytest.raises(RuntimeError, match=r"no backward pass through the adapter of layers\.0\.mlp\.up_proj"):
        step(weighted().grads())


def test_weight_norms_beside_answers_that_are_kept(monkeypatch):
    model = weighted()
    forward(model)
    monkeypatch.setattr(step_module, "is_kept", lambda groups: groups.keys() == {*map(id, model.trained())})
    with pytest.raises(RuntimeError, match=r"does not see the gradient that keep\(\) adds: use drift_norm='factor'"):
        step(model)
    for s in model.steered:
        s.release()
    assert_steps_as_the_oracle(Layers(settings()), "adaptive", "residual")  # by the factors' own norms


def test_taps_come_and_go():
    model = weighted()

    def taps():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert taps() == 6 and [s.capture.sketch for s in model.steered] == [None] * 3
    sketched = Layers(settings(drift_norm="weight", drift_sketch=5), count=1)
    assert sketched.steered[0].capture.sketch == 5
    model.steer(0)
    assert taps() == 6
    model.steered[1].release()
    assert taps() == 4 and model.layers[1].drift_peft == {}
    model.config.drift_alpha = 0.0
    model.steer(1)
    assert taps() == 4


# What is measured


def test_what_the_last_step_saw():
    model = Layers(settings("gradnorm"))
    oracles, grads = [*model.oracles()], [p.grad.clone() for p in model.trained()]
    assert all(s.stack is None for s in model.steered)
    step(model, 0.0)
    stack = model.steered[0].stack
    cosines, ratios = stack.last_step()
    for i, oracle in enumerate(oracles):
        found = [torch.cosine_similarity(g.flatten(), D.flatten(), dim=0)
                 for g, D in zip(grads[2 * i :], oracle.directions("residual"), strict=False)]  # fmt: skip
        close(cosines[i], sum(found) / 2, 1e-6)
        close(ratios[i], torch.tensor(oracle.strength(0.7, "gradnorm", "residual")), 1e-6)
        close(stack.norm[i], oracle.delta.norm(), 1e-5)
    assert Stack(model.steered, torch.device("cpu")).last_step() is None
    tensors = Tensors(settings("absolute", "delta"), (OUT,))
    grads = [p.grad.mul_(0.01).clone() for p in tensors.trained()]
    step(tensors)
    cosines, ratios = tensors.steered[0].stack.last_step()
    for i, (g, D) in enumerate(zip(grads, tensors.deltas, strict=True)):
        close(cosines[i], torch.cosine_similarity(g, D, dim=0), 1e-6)
        close(ratios[i], 0.7 * D.norm() / g.norm(), 1e-6)
        close(tensors.steered[0].stack.norm[i], D.norm(), 1e-6)


def test_no_gradient_has_no_ratio():
    model = Layers(settings("absolute", "delta"))
    for p in model.trained():
        p.grad.zero_()
    step(model)
    cosines, ratios = model.steered[0].stack.last_step()
    assert not cosines.any() and not ratios.any()


# DeepSpeed's engine


class Noting(Storage):
    """What an engine keeps elsewhere; here it notes only that it was asked."""

    asked = False

    def gradients(self, parameters):
        self.asked = True
        return super().gradients(parameters)

    def weights(self, parameters):
        self.asked = True
        return super().weights(parameters)


def engine_of(model, monkeypatch, applied=True, **changes):
    """An engine whose gradients are scaled by 8, and what deepspeed.py says of it."""
    optimizer = torch.optim.SGD(model.trained(), lr=0.1)
    engine = nn.Identity()
    engine.optimizer, engine.module, engine.was_step_applied = optimizer, model, lambda: applied
    fake = {
        "storage_of": {id(engine): (storage := Noting())},
        "groups_of": {id(engine): {id(p): optimizer.param_groups[0] for p in model.trained()}},
        "loss_scale_of": {id(engine): 8.0},
    }
    asked = {name: (lambda it, of=of: of[id(it)]) for name, of in (fake | changes).items()}
    monkeypatch.setattr(step_module, "deepspeed", SimpleNamespace(**asked))
    engine.storage = storage
    return engine


def by_hand(model):
    with torch.no_grad():
        for p in model.trained():
            p -= 0.1 * p.grad / 8
    return "done"


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize(("scale", "target"), [("absolute", "residual"), ("decoupled", "factors")])
def test_around_the_step_of_an_engine(scale, target, applied, monkeypatch):
    model = Layers(settings(scale, target))
    expected = model.expected(0.7, scale, target, 0.1)
    plain = [p.detach() - 0.1 * p.grad for p in model.trained()]
    for p in model.trained():
        p.grad *= 8
    engine = engine_of(model, monkeypatch, applied)
    assert _engine_step(engine, lambda: by_hand(model)) == "done"
    for p, pulled, alone in zip(model.trained(), expected, plain, strict=True):
        close(p, pulled if applied or scale == "absolute" else alone)
    assert model.config.drift_steps == applied and engine.storage.asked
    assert engine.optimizer.param_groups[0]["drift_steps.default"] == applied


def test_an_engine_that_trains_nothing_of_ours(monkeypatch):
    model = Layers(settings())
    engine = engine_of(model, monkeypatch, storage_of={})
    step_module.deepspeed.storage_of = lambda engine: None
    plain = [p.detach() - 0.1 * p.grad / 8 for p in model.trained()]
    assert _engine_step(engine, lambda: by_hand(model)) == "done"
    assert all(torch.equal(p, value) for p, value in zip(model.trained(), plain, strict=True))
    assert model.config.drift_steps == 0


@pytest.mark.parametrize(("reaches", "imported", "trains"), [(0, 1, 1), (1, 1, 1), (0, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("kind", ["adapters", "tensors"])
def test_copies_that_guidance_does_not_reach(reaches, imported, trains, kind, monkeypatch):
    model = Layers(settings()) if kind == "adapters" else Tensors(settings(), count=3)
    theirs = {id(p) for p in model.trained()[2:]} if trains else set()
    answers = {"reaches": lambda: reaches, "imported": lambda: imported, "trains": lambda p: id(p) in theirs}
    monkeypatch.setattr(step_module, "deepspeed", SimpleNamespace(**answers))
    if (reaches, imported, trains) == (0, 1, 1):
        with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO trains copies of the parameters, .* use 0\.19"):
            step(model)
    else:
        step(model)
