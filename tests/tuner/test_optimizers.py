"""Every optimizer that people train LoRA with: a guided step is the oracle's bias, then that optimizer's own step."""

import copy
import warnings

import bitsandbytes.optim as bnb
import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
from torch import optim
from transformers.optimization import Adafactor
from twin import (
    ALPHA,
    assert_guided_like_oracle,
    assert_same_update,
    backward,
    sgd,
    state,
    steered,
    train,
    trainable,
)

from drift_peft import telemetry


def lora_plus(parameters):
    """A higher learning rate for B; the parameters come as A, B, A, B, …"""
    return optim.SGD([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.08}], lr=0.02)


def one_rate_each(parameters):
    return optim.SGD([{"params": p, "lr": 0.02 + i / 1000} for i, p in enumerate(parameters)])


def schedule_free(kind):
    def make(parameters):
        optimizer = kind(parameters, lr=0.02)
        optimizer.train()
        return optimizer

    return make


TORCH = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.02, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: optim.AdamW(p, lr=0.02),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.02, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.02, fused=True),
    "AdamW, lr a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.02)),
    "Adamax": lambda p: optim.Adamax(p, lr=0.02),
    "NAdam": lambda p: optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: optim.RAdam(p, lr=0.02),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.02),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.02),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.02),
    "Muon": lambda p: optim.Muon(p, lr=0.02),
    "LoRA+": lora_plus,
    "one rate each": one_rate_each,
}
OTHERS = {
    "Adafactor of transformers": lambda p: Adafactor(p, lr=0.02, relative_step=False, scale_parameter=False),
    "Lion": lambda p: lion_pytorch.Lion(p, lr=0.01),
    "Prodigy": lambda p: prodigyopt.Prodigy(p, lr=1.0, d0=1e-2),
    "AdamW schedule-free": schedule_free(schedulefree.AdamWScheduleFree),
    "SGD schedule-free": schedule_free(schedulefree.SGDScheduleFree),
}
IN_8_BIT = {
    "AdamW8bit": lambda p: bnb.AdamW8bit(p, lr=0.02, min_8bit_size=1),
    "Lion8bit": lambda p: bnb.Lion8bit(p, lr=0.01, min_8bit_size=1),
    "PagedAdamW8bit": lambda p: bnb.PagedAdamW8bit(p, lr=0.02, min_8bit_size=1),
    "AdEMAMix8bit": lambda p: bnb.AdEMAMix8bit(p, lr=0.02, min_8bit_size=1),
    "AdamW32bit": lambda p: bnb.AdamW(p, lr=0.02),
}


@pytest.mark.parametrize("make", [*TORCH.values(), *OTHERS.values()], ids=[*TORCH, *OTHERS])
def test_optimizers(pair, make):
    """Apart from the gradient, after the step, by the learning rates that this optimizer had in it."""
    assert_guided_like_oracle(pair, lambda model: make(trainable(model)), "decoupled", "factors")


BY_GRADIENT = "SGD", "AdamW foreach", "AdamW fused", "Adafactor", "Muon", "LoRA+", "Lion", "SGD schedule-free"


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_optimizers_by_the_gradient(pair, name):
    """Which every optimizer reads as it finds it, so that some are enough."""
    make = (TORCH | OTHERS)[name]
    assert_guided_like_oracle(pair, lambda model: make(trainable(model)), "adaptive", "residual")


@pytest.mark.parametrize("kind", [schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree])
def test_what_a_schedule_free_optimizer_saves_is_held_at_the_base(pair, kind):
    """Its second weights, of which the saved ones are a mean, go toward the target as those that are trained."""
    model, rate, steps = steered(pair, "decoupled", "base"), 0.02 * ALPHA["decoupled"], 20
    optimizer = schedule_free(kind)(trainable(model))
    start = state(model)
    for _ in range(steps):
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.eval()
    for name, value in state(model).items():
        share = (1 - rate) ** steps if "lora_B" in name else 1.0
        torch.testing.assert_close(value, share * start[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])
@pytest.mark.parametrize("make", IN_8_BIT.values(), ids=IN_8_BIT)
def test_optimizers_of_bitsandbytes(pair, scale, target, make):
    """States in 8 bit turn what fp32 rounds into some percent of the update."""
    options = {"dtype": torch.float32, "tolerance": 2e-2}
    assert_guided_like_oracle(pair, lambda model: make(trainable(model)), scale, target, **options)


def test_an_optimizer_that_maximizes_is_refused(pair):
    model = steered(pair)
    with pytest.raises(RuntimeError, match=r"maximize=True .* negate the loss"):
        train(model, optim.SGD(trainable(model), lr=0.05, maximize=True))


@pytest.mark.parametrize("drift_norm", ["factor", pytest.param("weight", marks=pytest.mark.slow)])
def test_a_compiled_model(pair, drift_norm):
    """Gradients accumulated by the compiled model give the same steps."""
    torch._dynamo.reset()  # it does not look at a module's hooks when it takes up what it compiled for another one
    model = steered(pair, dtype=torch.float32, drift_norm=drift_norm)
    other, start = copy.deepcopy(model), state(model)
    train(model, sgd(model, lr=1.0))
    optimizer, compiled = sgd(other, lr=1.0), torch.compile(other, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            backward(compiled, share=0.5)
        optimizer.step()
    assert telemetry(other)["guided_steps"] == 2
    assert_same_update(other, model, start, 1e-5)


class Foreign:
    """An optimizer that is none of torch's, and calls no hooks."""

    def __init__(self, parameters):
        self.parameters = parameters

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p -= 0.05 * p.grad


def test_an_optimizer_that_is_none_of_torchs_is_told_of(pair, tmp_path):
    model = steered(pair)
    for p in (p for n, p in model.named_parameters() if "lora_B" in n):
        p.data.zero_()
    backward(model)
    Foreign(trainable(model)).step()
    assert telemetry(model)["guided_steps"] == 0
    with pytest.warns(UserWarning, match="the guidance never ran"), warnings.catch_warnings():
        model.save_pretrained(tmp_path)
