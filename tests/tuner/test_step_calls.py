"""Every way to call an optimizer: closures, steps within steps, failures, several optimizers, loss scaling."""

import copy
from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from processes import replicated
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from twin import (
    ALPHA,
    BATCH,
    assert_same_update,
    backward,
    bias_by_oracle,
    each_scale,
    pull_by_oracle,
    sgd,
    state,
    steered,
    three_modes,
    train,
    train_by_oracle,
    trainable,
    twin_of,
)

from drift_peft import telemetry

# Ways to call an optimizer


@pytest.mark.parametrize("call", ["positional", "keyword"])
@pytest.mark.parametrize(("scale", "target"), [("gradnorm", "residual"), ("decoupled", "factors")])
def test_closures_are_guided_after_they_ran(pair, scale, target, call):
    model = steered(pair, scale, target)
    twin, start = twin_of(pair, model), state(model)
    train_by_oracle(twin, sgd(twin), pair.prior, scale, target)
    optimizer = sgd(model)

    def closure():
        optimizer.zero_grad()
        return backward(model)

    backward(model, BATCH.flip(1))  # stale gradients, which nobody must look at
    for _ in range(2):
        loss = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
        assert loss > 0
    assert_same_update(model, twin, start)
    assert telemetry(model)["guided_steps"] == 2


def test_data_parallel(pair, monkeypatch):
    """Its replicas are copies without parameters; the step is guided as on one device."""
    model = steered(pair, "adaptive", "residual")
    twin, start, optimizer = copy.deepcopy(model), state(model), sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        replicas = replicated(model, monkeypatch)
        for replica, ids in zip(replicas, BATCH.chunk(2), strict=True):
            (replica(input_ids=ids, labels=ids).loss / 2).backward()
        optimizer.step()
    train(twin, sgd(twin))
    assert_same_update(model, twin, start)
    assert telemetry(model)["guided_steps"] == 2


class Stretched(torch.optim.SGD):
    """Its step takes something else than a closure."""

    @torch.no_grad()
    def step(self, factor):
        for p in self.param_groups[0]["params"]:
            p -= factor * self.param_groups[0]["lr"] * p.grad


def test_an_argument_that_is_no_closure_is_the_optimizers_own(pair):
    model = steered(pair)
    twin, start = twin_of(pair, model), state(model)
    backward(model)
    Stretched(trainable(model), lr=0.1).step(0.5)
    train_by_oracle(twin, sgd(twin, lr=0.05), pair.prior, "adaptive", "residual", 1)
    assert_same_update(model, twin, start)


@each_scale
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_that_is_asked_for_before_the_first_step_is_no_step(pair, scale, target, optimizer):
    """torch.distributed.checkpoint steps on gradients of zeros then, to have one."""
    model = steered(pair, scale, target, drift_warmup_steps=2)
    twin = copy.deepcopy(model)
    asked, other = optimizer(trainable(model), lr=0.01), optimizer(trainable(twin), lr=0.01)
    get_optimizer_state_dict(model, asked)
    assert asked.param_groups[0]["drift_steps.default"] == 0 == telemetry(model)["guided_steps"]
    train(model, asked)
    train(twin, other)
    assert telemetry(model)["guided_steps"] == 2
    if optimizer is torch.optim.SGD:  # AdamW has counted the step for its own averages
        assert all(torch.equal(p, q) for p, q in zip(trainable(model), trainable(twin), strict=True))


def test_lbfgs_is_guided_at_every_evaluation(pair):
    model = steered(pair, "gradnorm")
    twin, start = twin_of(pair, model), state(model)
    for m in (model, twin):
        optimizer = torch.optim.LBFGS(trainable(m), lr=0.5, max_iter=4)
        evaluations = []

        def closure(m=m, optimizer=optimizer, evaluations=evaluations):
            evaluations.append(1)
            optimizer.zero_grad()
            loss = backward(m)
            if m is twin:
                bias_by_oracle(twin, pair.prior, "gradnorm", "residual")
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert len(evaluations) == 8
    assert_same_update(model, twin, start, 1e-4)
    assert telemetry(model)["guided_steps"] == 2


class Child(torch.optim.SGD):
    """An optimizer whose step is its parent's, called through super()."""

    def step(self, closure=None):
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, sharing its parameters or holding others of its own."""

    def __init__(self, parameters, inner):
        super().__init__(parameters, {"lr": inner.param_groups[0]["lr"]})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if not any(p is q for g in self.inner.param_groups for q in g["params"]):
                    p -= group["lr"] * p.grad
        return self.inner.step(closure)


def child(model):
    torch.optim.SGD(trainable(model), lr=1)  # from here on both classes' step() call the hooks
    return Child(trainable(model), lr=0.05)


def around_all(model):
    return Wrapper(trainable(model), sgd(model))


def around_the_rest(model):
    first, *rest = trainable(model)
    return Wrapper([first], torch.optim.SGD(rest, lr=0.05))


@pytest.mark.parametrize(
    ("make", "with_closure"), [(child, False), (child, True), (around_all, False), (around_the_rest, False)]
)
@pytest.mark.parametrize(("scale", "target"), [("gradnorm", "residual"), ("decoupled", "factors")])
def test_a_step_within_a_step_is_guided_once(pair, make, with_closure, scale, target):
    model = steered(pair, scale, target)
    twin, start = twin_of(pair, model), state(model)
    train_by_oracle(twin, sgd(twin), pair.prior, scale, target)
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        model.zero_grad()
        return backward(model)

    for _ in range(2):
        if not with_closure:
            closure()
        optimizer.step(closure if with_closure else None)
    # Of a pair of factors in two steps, the second one's direction is taken after the first has moved.
    assert_same_update(model, twin, start, 1e-3 if make is around_the_rest else 1e-6)


@pytest.mark.parametrize("make", [sgd, child])
def test_a_compiled_step_calls_what_acts_and_does_not_trace_it(pair, make):
    """One graph, that of the update; traced, there were forty."""
    found = []
    for compiled in (False, True):
        model = steered(pair, "adaptive", "residual", drift_warmup_steps=2)
        optimizer, counter = make(model), CompileCounterWithBackend("eager")
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            step()
        found.append(state(model))
        assert telemetry(model)["guided_steps"] == 3 and counter.frame_count == compiled
    assert all(torch.allclose(found[1][name], tensor, rtol=1e-9) for name, tensor in found[0].items())


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("where", ["step", "closure"])
def test_a_step_that_failed_does_not_disturb_the_next(pair, where):
    model = steered(pair)
    twin = twin_of(pair, model)
    failing = Fails(trainable(model), lr=0.0)
    if where == "step":
        backward(model)
        with pytest.raises(RuntimeError, match="in the middle"):
            failing.step()
    else:
        with pytest.raises(ZeroDivisionError):
            sgd(model).step(lambda: 1 / 0)
    start = state(model)
    train(model, sgd(model))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    assert_same_update(model, twin, start)
    assert telemetry(model)["guided_steps"] == 2


@pytest.mark.parametrize("split", ["layers.0", "lora_A"])
@pytest.mark.parametrize(("scale", "target"), [("gradnorm", "residual"), ("decoupled", "factors")])
def test_two_optimizers_with_a_part_of_the_parameters_each(pair, scale, target, split):
    """An iteration counts once, and both have its place in warm-up."""
    model = steered(pair, scale, target, drift_warmup_steps=2)
    twin, start = twin_of(pair, model), state(model)

    def halves(m):
        named = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
        return [torch.optim.SGD([p for n, p in named if (split in n) == one], lr=0.05) for one in (True, False)]

    both = halves(model)
    for _ in range(3):
        backward(model)
        for optimizer in both:
            optimizer.step()
        model.zero_grad()
    both = halves(twin)
    for i in range(3):
        backward(twin)
        strength = partial(lambda share, name: share * ALPHA[scale], min(1, i / 2))
        for optimizer in both:
            parameters = optimizer.param_groups[0]["params"]
            bias_by_oracle(twin, pair.prior, scale, target, only=parameters, alpha=strength)
            optimizer.step()
            pull_by_oracle(twin, pair.prior, scale, optimizer, alpha=strength)
        twin.zero_grad()
    assert_same_update(model, twin, start)
    assert telemetry(model)["guided_steps"] == 3


def test_one_optimizer_for_two_models_with_settings_of_their_own(pair):
    modes = ("gradnorm", "residual"), ("absolute", "residual")
    models = [steered(pair, *mode) for mode in modes]
    twins, start = [twin_of(pair, m) for m in models], state(models[0])
    train(torch.nn.ModuleList(models), sgd(torch.nn.ModuleList(models)), 3, lambda both: [backward(m) for m in both])
    for model, twin, mode in zip(models, twins, modes, strict=True):
        train_by_oracle(twin, sgd(twin), pair.prior, *mode, 3)
        assert_same_update(model, twin, start)
        assert telemetry(model)["guided_steps"] == 3


def test_steps_are_counted_on_by_a_resumed_optimizer(pair):
    """A checkpoint brings the optimizer's state back into a process whose model was wrapped anew."""
    model = steered(pair)
    before = sgd(model)
    train(model, before, 3)
    train(model, sgd(model), 2)  # another optimizer counts on too
    assert telemetry(model)["guided_steps"] == 5
    again = steered(pair)
    optimizer = sgd(again)
    optimizer.load_state_dict(before.state_dict())
    train(again, optimizer, 2)
    assert telemetry(again)["guided_steps"] == 5


# Loss scaling


def scaled_step(model, optimizer, scaler, unscale=False, ids=BATCH):
    optimizer.zero_grad()
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(("fused", "unscale"), [(True, False), (True, True), (False, False)])
@each_scale
def test_loss_scaling_does_not_change_the_update(pair, scale, target, unscale, fused):
    model = steered(pair, scale, target, dtype=torch.float32)
    other, start = copy.deepcopy(model), state(model)
    make = {"lr": 0.01, "fused": fused}
    train(model, torch.optim.AdamW(trainable(model), **make), 3)
    optimizer, scaler = torch.optim.AdamW(trainable(other), **make), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        scaled_step(other, optimizer, scaler, unscale)
    assert_same_update(other, model, start, 1e-4)
    assert telemetry(other)["guided_steps"] == 3


@pytest.mark.parametrize("fused", [True, False])
@three_modes
def test_a_step_skipped_on_inf_applies_nothing(pair, scale, target, fused):
    model = steered(pair, scale, target, dtype=torch.float32)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = state(model)
    with torch.no_grad():
        poison = next(m for m in model.modules() if isinstance(m, LoraLayer)).base_layer.weight
        sound, poison[0, 0] = poison[0, 0].clone(), torch.inf
    scaled_step(model, optimizer, scaler)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(start[n], p) for n, p in state(model).items())
    assert telemetry(model)["guided_steps"] == 0
    with torch.no_grad():
        poison[0, 0] = sound
    for _ in range(2):
        scaled_step(model, optimizer, scaler)
    assert telemetry(model)["guided_steps"] == 2
    assert model.peft_config["default"].to_dict()["drift_steps"] == 2
