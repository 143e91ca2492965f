"""batches.py, step.py and steered.py at their lowest level: a few layers without a model around them, whose gradients
are given, against the oracle."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from reference import Layer, Whole, schedule
from torch import nn

from drift_peft import DriftConfig
from drift_peft.prior import PriorVector, PriorWeight
from drift_peft.tuner import batches, steered
from drift_peft.tuner import step as step_module
from drift_peft.tuner.batches import bias_gradients, groups_of, pull_parameters
from drift_peft.tuner.sharding import Storage
from drift_peft.tuner.steered import (
    STEERED,
    Stack,
    SteeredAdapter,
    SteeredTensor,
    lora_factor,
    lora_layers,
    steered_of,
    trainable_tensors,
)
from drift_peft.tuner.step import _engine_step

OUT, IN, R, K = 5, 4, 3, 6
SCALES = ("absolute", "gradnorm", "adaptive")
every_mode = pytest.mark.parametrize(
    ("scale", "target"),
    [(scale, target) for scale in SCALES for target in ("residual", "delta", "factors")] + [("decoupled", "factors")],
)


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior_weight(seed, out=OUT, in_=IN):
    U, S, Vh = torch.linalg.svd(2 * randn(out, in_, seed=seed), full_matrices=False)
    return PriorWeight(U.bfloat16(), S.float(), Vh.bfloat16(), 1.0, 1.0, 0.9, 1.0, ())


def settings(scale="adaptive", target="residual", **more):
    return DriftConfig(prior="prior", r=R, drift_alpha=0.7, drift_scale=scale, drift_target=target, **more)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


class Layers(nn.Module):
    """Adapted layers of one shape, each with a scaling and a Δ of its own, and gradients of their factors."""

    def __init__(self, config, count=3, dtype=torch.float64, others=()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(count))
        self.config, self.prior = config, [prior_weight(i) for i in range(count)]
        for name in ("default", *others):
            inject_adapter_in_model(LoraConfig(r=R, lora_alpha=6, target_modules=r"layers\.\d+"), self, name)
        for i, layer in enumerate(self.layers):
            layer.set_adapter(["default", *others])
            for j, name in enumerate(("default", *others)):
                layer.scaling[name] = 1.0 + 0.5 * i + j
                for factor in "AB":
                    p = lora_factor(layer, factor, name)
                    p.data = randn(*p.shape, seed=10 * i + j).to(dtype)
        self.steered = [self.steer(i) for i in range(count)]
        self.grads()

    def steer(self, i):
        name = f"layers.{i}.mlp.up_proj.weight"
        entry = SteeredAdapter(self.layers[i], "default", name, self.config, self.prior[i])
        entry.register()
        return entry

    def trained(self):
        return [lora_factor(layer, factor, "default") for layer in self.layers for factor in "AB"]

    def grads(self, seed=7):
        for i, p in enumerate(self.trained()):
            p.grad = randn(*p.shape, seed=seed + i).to(p.dtype)
        return self

    def oracles(self, rank=None, power=1.0):
        for layer, w in zip(self.layers, self.prior, strict=True):
            of = [(lora_factor(layer, "A", a), lora_factor(layer, "B", a), layer.scaling[a]) for a in layer.r]
            A, B, s = of[0]
            yield Layer(A, B, s, w.U, w.S, w.Vh, rank, of[1:], power)

    def expected(self, a, scale, target, lr, **which):
        """The factors after one step of SGD, as the oracle has them."""
        result = []
        for layer, oracle in zip(self.layers, self.oracles(**which), strict=True):
            A, B = (lora_factor(layer, factor, "default") for factor in "AB")
            if scale == "decoupled":
                oracle.A, oracle.B = oracle.A - lr * A.grad, oracle.B - lr * B.grad
                result += oracle.pulled(lr, a, target)
            else:
                g_A, g_B = oracle.biased(A.grad, B.grad, a, scale, target)
                result += [oracle.A - lr * g_A, oracle.B - lr * g_B]
        return result


def step(model, lr=0.1, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.trained(), lr=lr)
    optimizer.step()
    return optimizer


def assert_steps_as_the_oracle(model, scale, target, tolerance=1e-9, a=0.7, **which):
    expected = model.expected(a, scale, target, 0.1, **which)
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value, tolerance)


# One step of adapters


@every_mode
@pytest.mark.parametrize("elements", [1, 2 * OUT * R, 2**24])  # one layer at a time, two, all
def test_every_mode(scale, target, elements, monkeypatch):
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", elements)
    model = Layers(settings(scale, target))
    sizes = [len(group.parameters["A"]) for group in groups_of(model.steered, {*map(id, model.trained())})]
    assert sizes == {1: [1, 1, 1], 30: [2, 1], 2**24: [3]}[elements]
    assert_steps_as_the_oracle(model, scale, target)


@every_mode
def test_fp32_and_bf16_parameters(scale, target):
    assert_steps_as_the_oracle(Layers(settings(scale, target), dtype=torch.float32), scale, target, 1e-5)
    assert_steps_as_the_oracle(Layers(settings(scale, target), dtype=torch.bfloat16), scale, target, 0.05)


@pytest.mark.parametrize("scale", SCALES)
def test_other_active_adapters_are_subtracted(scale):
    assert_steps_as_the_oracle(Layers(settings(scale), others=["second", "third"]), scale, "residual")
    model = Layers(settings(scale), others=["second"])
    assert model.steered[0].others == ["second"]
    model.layers[0].set_adapter(["second", "default"])
    model.layers[1].set_adapter("default")
    assert [s.others for s in model.steered] == [["second"], [], ["second"]]
    assert len(groups_of(model.steered, {*map(id, model.trained())})) == 2


@pytest.mark.parametrize(("rank", "power"), [(1, 1.0), (2, 0.5), (None, 2.0)])
def test_rank_and_spectrum(rank, power):
    model = Layers(settings("gradnorm", "delta", drift_rank=rank, drift_spectrum=power))
    assert_steps_as_the_oracle(model, "gradnorm", "delta", 1e-6, rank=rank, power=power)


def test_strengths_of_their_own():
    config = settings("absolute", "delta", drift_alpha_pattern={r"layers\.1\..*": 0.0, r"layers\.2\..*": 2.0})
    model = Layers(config)
    found = [*zip(*[iter(step_of_each(model, a) for a in (0.7, 0.0, 2.0))], strict=True)]
    step(model)
    for i, (expected,) in enumerate(found):
        close(model.trained()[2 * i], expected[2 * i])
        close(model.trained()[2 * i + 1], expected[2 * i + 1])


def step_of_each(model, a):
    return model.expected(a, "absolute", "delta", 0.1)


@pytest.mark.parametrize("missing", ["A", "B", "layer"])
@every_mode
def test_what_has_no_gradient_stays(scale, target, missing):
    model = Layers(settings(scale, target))
    expected = model.expected(0.7, scale, target, 0.1)
    without = {"A": [0, 2, 4], "B": [1, 3, 5], "layer": [0, 1]}[missing]
    for i in without:
        model.trained()[i].grad, expected[i] = None, model.trained()[i].detach().clone()
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value)


def test_the_scale_that_an_optimizer_unscales_by_itself():
    model = Layers(settings("absolute"))
    expected = model.expected(0.7, "absolute", "residual", 0.1 * 64)[:2]
    for p in model.trained():
        p.grad *= 64
    optimizer = Discarding(model.trained())  # which does not, so that its rate is 64 times as large
    optimizer.grad_scale = torch.tensor(64.0, dtype=torch.float64)
    optimizer.step()
    for p, value in zip(model.trained(), expected, strict=False):
        close(p, value)


def test_settings_that_meet_in_one_step():
    still, *models = Layers(settings("decoupled", "factors")), Layers(settings()), Layers(settings())
    everything = [s for each in (still, *models) for s in each.steered]
    groups = groups_of(everything, {id(p) for each in (still, *models) for p in each.trained()})
    assert [group.config for group in groups] == [each.config for each in (still, *models)]
    plain = [p.grad.clone() for p in still.trained()]
    bias_gradients(groups)
    assert all(torch.equal(p.grad, g) for p, g in zip(still.trained(), plain, strict=True))
    assert not any(torch.equal(p.grad, g) for each in models for p, g in zip(each.trained(), plain, strict=True))
    with pytest.warns(UserWarning, match="twice on the same gradients"):
        bias_gradients(groups)
    assert [each.config.repeated_steps for each in (still, *models)] == [0, 1, 1]


def test_priors_of_different_ranks_go_through_apart():
    model = Layers(settings("gradnorm"))
    w = model.prior[1]
    model.prior[1] = PriorWeight(w.U[:, :2], w.S[:2], w.Vh[:2], 1.0, 1.0, 0.9, 1.0, ())
    model.steer(1)
    assert_steps_as_the_oracle(model, "gradnorm", "residual")


# After the step


def test_learning_rates_of_their_own():
    model = Layers(settings("decoupled", "factors"))
    rates = [0.1, 0.2, 0.1, 0.2, 0.3, 0.2]
    expected = [model.expected(0.7, "decoupled", "factors", lr)[i] for i, lr in enumerate(rates)]
    groups = [{"params": [p], "lr": torch.tensor(lr) if i == 4 else lr}
              for i, (p, lr) in enumerate(zip(model.trained(), rates, strict=True))]  # fmt: skip
    torch.optim.SGD(groups).step()
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value, 1e-7)


def test_a_pull_is_undone_where_the_update_was():
    model = Layers(settings("decoupled", "factors"))
    groups, before = groups_of(model.steered, {*map(id, model.trained())}), copy.deepcopy(model.state_dict())
    rates = dict.fromkeys(map(id, model.trained()), 0.1)
    bias_gradients(groups)  # which the decoupled scale leaves alone
    pull_parameters(groups, rates, torch.tensor(0.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.trained(), Layers(model.config).trained(), strict=True)
    )
    expected = [value for oracle in model.oracles() for value in oracle.pulled(0.1, 0.7)]
    pull_parameters(groups, rates)
    assert not any(torch.equal(p, before[key]) for key, p in model.state_dict().items() if "lora" in key)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value)


def test_a_pull_on_tensors_is_undone_too():
    model = Tensors(settings("decoupled", "factors"))
    groups, before = groups_of(model.steered, {*map(id, model.trained())}), copy.deepcopy(model.state_dict())
    pull_parameters(groups, dict.fromkeys(map(id, model.trained()), 0.1), torch.tensor(0.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_the_decoupled_scale_pulls():
    model = Layers(settings())
    before = copy.deepcopy(model.state_dict())
    pull_parameters(groups_of(model.steered, {*map(id, model.trained())}), dict.fromkeys(map(id, model.trained()), 0.1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_base_pulls_b_to_zero():
    model = Layers(DriftConfig(r=R, drift_alpha=0.7, drift_scale="decoupled", drift_target="base"))
    model.prior = [None] * 3
    A = [p.detach() - 0.1 * p.grad for p in model.trained()[::2]]
    B = [(1 - 0.1 * 0.7) * (p.detach() - 0.1 * p.grad) for p in model.trained()[1::2]]
    for i in range(3):
        model.steer(i)
    step(model)
    for layer, a, b in zip(model.layers, A, B, strict=True):
        close(lora_factor(layer, "A", "default"), a)
        close(lora_factor(layer, "B", "default"), b)


def test_decoupled_without_a_rate_is_refused():
    model = Layers(settings("decoupled", "factors"))
    groups = groups_of(model.steered, {*map(id, model.trained())})
    rates = dict.fromkeys(map(id, model.trained()), 0.1) | {id(model.trained()[2]): None}
    with pytest.raises(RuntimeError, match="moves by the learning rate, and this optimizer's parameter groups"):
        pull_parameters(groups, rates)


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
    at = 3 if isinstance(config_steps, int) and config_steps < 3 else config_steps  # it never goes back
    expected = model.expected(0.7 * float(at) / 10, "absolute", "residual", 0.1)
    step(model, optimizer=optimizer)
    assert model.config.drift_steps == at + 1
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


class Discarding(torch.optim.Optimizer):
    """Its step takes the gradients of all but the first layer away, as some do that are done with them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.param_groups[0]["params"]):
            p -= 0.1 * p.grad
            p.grad = p.grad if i < 2 else None


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


def forward(model):
    """Gradients of a loss through every layer; returns the dense G of each layer's weight."""
    found = []
    for i, layer in enumerate(model.layers):
        layer.base_layer.weight.requires_grad_(True)
        layer.double()
        layer(randn(6, IN, seed=50 + i)).tanh().square().sum().backward()
        found.append(layer.base_layer.weight.grad.clone())
        layer.base_layer.weight.requires_grad_(False)
    return found


def weighted(target="residual", scale="adaptive", **more):
    model = Layers(settings(scale, target, drift_norm="weight", drift_sketch=None), **more)
    for p in model.trained():
        p.grad = None
    return model


@pytest.mark.parametrize("target", ["residual", "delta"])
@pytest.mark.parametrize("scale", SCALES)
def test_norms_of_the_weight_gradient(scale, target):
    model = weighted(target, scale, count=2)
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
    assert taps() == 4 and model.layers[1].drift == {}
    model.config.drift_alpha = 0.0
    model.steer(1)
    assert taps() == 4


# Tensors that are trained themselves


class Tensors(nn.Module):
    def __init__(self, config, size=(OUT, IN), count=2, dtype=torch.float64):
        super().__init__()
        self.parts = nn.ModuleList(nn.Module() for _ in range(count))
        self.steered, self.deltas, self.start = [], [], []
        for i, part in enumerate(self.parts):
            part.weight = nn.Parameter(randn(*size, seed=i).to(dtype))
            if len(size) == 1:
                w = PriorVector(randn(*size, seed=20 + i).float(), 1.0, 1.0, 0.9)
                delta = w.delta.double()
            else:
                w = prior_weight(30 + i, *size)
                k = config.drift_rank
                delta = w.U[:, :k].double() * w.S[:k].double() @ w.Vh[:k].double()
            W0 = randn(*size, seed=40 + i).to(dtype)
            self.deltas.append(delta), self.start.append(W0)
            held = None if config.drift_target == "delta" else W0
            w = None if config.prior is None else w
            self.steered.append(SteeredTensor(part, "default", "weight", f"layers.{i}.norm.weight", config, w, held))
            self.steered[-1].register()
            part.weight.grad = randn(*size, seed=60 + i).to(dtype)

    def trained(self):
        return [part.weight for part in self.parts]

    def expected(self, a, scale, target, lr):
        for p, W0, delta in zip(self.trained(), self.start, self.deltas, strict=True):
            oracle = Whole(p, W0, delta)
            if scale == "decoupled":
                oracle.W = oracle.W - lr * p.grad.double()
                yield oracle.pulled(lr, a, target)[0]
            else:
                yield oracle.W - lr * oracle.biased(p.grad.double(), a, scale, target)[0]


@pytest.mark.parametrize("of", [Layers, Tensors])
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_that_a_scaler_has_scaled(scale, of):
    """absolute adds its bias in the scaled gradient's unit; the others follow the gradient's own norm."""
    model, scaled = of(settings(scale)), of(settings(scale))
    for p in scaled.trained():
        p.grad *= 64
    for each, loss_scale in ((model, None), (scaled, torch.tensor(64.0, dtype=torch.float64))):
        bias_gradients(groups_of(each.steered, {*map(id, each.trained())}), loss_scale)
    for p, q in zip(model.trained(), scaled.trained(), strict=True):
        close(64 * p.grad, q.grad)


@every_mode
@pytest.mark.parametrize("size", [(OUT, IN), (OUT,)])
@pytest.mark.parametrize("elements", [1, 16, 2**24])  # a row at a time, two of two tensors, all
def test_tensors_in_every_mode(scale, target, size, elements, monkeypatch):
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", 2**24)
    monkeypatch.setattr(batches, "BATCH_ELEMENTS", elements)
    model = Tensors(settings(scale, target), size)
    expected = [*model.expected(0.7, scale, target, 0.1)]
    group = groups_of(model.steered, {*map(id, model.trained())})[0].batch()
    rows = [rows for rows, _ in group.blocks()]
    m = size[0] if len(size) == 2 else 1
    length = max(1, elements // (2 * size[-1]))
    assert rows == [slice(start, start + length) for start in range(0, m, length)]
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(OUT, IN), (OUT,)])
def test_tensors_near_their_goal_are_pulled_less(scale, size):
    model = Tensors(settings(scale), size)
    for p, W0, delta in zip(model.trained(), model.start, model.deltas, strict=True):
        p.data = W0 + 0.7 * delta
    expected = [*model.expected(0.7, scale, "residual", 0.1)]
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value, 1e-7)


@pytest.mark.parametrize("prior", ["prior", None])
@pytest.mark.parametrize("size", [(OUT, IN), (OUT,)])
def test_tensors_go_back_to_where_they_began(size, prior):
    config = DriftConfig(prior=prior, r=R, drift_alpha=0.7, drift_scale="decoupled", drift_target="base")
    model = Tensors(config, size)
    expected = [*model.expected(0.7, "decoupled", "base", 0.1)]
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        close(p, value)


def test_tensors_by_rank_in_bf16():
    model = Tensors(settings("gradnorm", "residual", drift_rank=2), dtype=torch.bfloat16)
    expected = [*model.expected(0.7, "gradnorm", "residual", 0.1)]
    step(model)
    for p, value in zip(model.trained(), expected, strict=True):
        assert p.grad.dtype == torch.bfloat16
        close(p, value, 0.05)


def test_batches_of_tensors(monkeypatch):
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", 2 * OUT * IN)
    model = Tensors(settings(), count=3)
    assert [len(g.parameters["W"]) for g in groups_of(model.steered, {*map(id, model.trained())})] == [2, 1]
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", 1)
    assert [len(g.parameters["W"]) for g in groups_of(model.steered, {*map(id, model.trained())})] == [1, 1, 1]
    alone = Tensors(settings(), count=1)
    assert len(groups_of(alone.steered, {*map(id, alone.trained())})) == 1
    assert [(s.adapter, s.name) for s in model.steered] == [("default", f"layers.{i}.norm.weight") for i in range(3)]


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


# Stacks


def test_a_stack_serves_the_batch_that_it_was_made_of_and_no_other():
    a, b, c = Layers(settings()).steered
    cpu = torch.device("cpu")
    stack = Stack.of([a, b], cpu)
    assert Stack.of([a, b], cpu) is stack and a.stack is b.stack is stack
    assert a.prior["U"].data_ptr() == stack.prior["U"][0].data_ptr()  # in memory once
    for batch in ([a, c], [a], [a, b, c], [b, a]):  # of another size, of other members, in another order
        again = Stack.of(batch, cpu)
        assert again is not stack and [member() for member in again.members] == batch
        for i, member in enumerate(batch):
            assert torch.equal(again.prior["U"][i], member.prior["U"])
        stack = Stack.of([a, b], cpu)


def test_another_batch_of_the_same_size_is_guided_by_its_own_delta():
    model = Layers(settings("absolute", "delta"))
    for first, second in ((0, 1), (0, 2), (1, 2)):  # layers that train together, in turn
        model.grads()
        expected = model.expected(0.7, "absolute", "delta", 0.1)
        for i in {0, 1, 2} - {first, second}:
            for j in (2 * i, 2 * i + 1):
                model.trained()[j].grad, expected[j] = None, model.trained()[j].detach().clone()
        step(model)
        for p, value in zip(model.trained(), expected, strict=True):
            close(p, value)


def test_the_scaling_is_read_at_each_step():
    model = Layers(settings("absolute", "delta"))
    for factor in (1.0, 2.0, 2.0):
        for layer in model.layers:
            layer.scaling["default"] *= factor
        assert_steps_as_the_oracle(model.grads(), "absolute", "delta")
    stack = model.steered[0].stack
    first = stack.scaling(torch.float32)
    assert first.dtype == torch.float32 and first.tolist() == [4.0, 6.0, 8.0] and stack.scaling(torch.float32) is first
    assert stack.scaling(torch.float64).dtype == torch.float64


# Who is steered


def test_who_is_steered():
    model = Layers(settings(), others=["second"])
    assert steered_of(model) == model.steered and all(s in STEERED and s.present for s in model.steered)
    model.layers[1].set_adapter("second")
    assert steered_of(model) == []  # its adapter is idle in one of the layers
    model.layers[1].set_adapter("default")
    first = model.steered[0]
    again = model.steer(0)  # in place of what was there
    assert steered_of(model) == [again, *model.steered[1:]] and first not in STEERED
    again.release()
    assert again not in STEERED and model.layers[0].drift == {}
    model.layers[2].delete_adapter("default")
    assert (
        not model.steered[2].present and model.steered[2].among({1}) == () and steered_of(model) == [model.steered[1]]
    )
    layer, entry = model.layers[1], model.steered[1]
    ids = {id(lora_factor(layer, "B", "default"))}
    assert entry.among(ids) == ("B",) and entry.among(()) == ()
    assert entry.state() == (0.7, ("default",), 2)
    del model, layer
    assert not entry.present and entry.among(ids) == () and entry.state() == ()


def test_a_tensor_that_is_gone():
    model = Tensors(settings())
    entry = model.steered[0]
    assert entry.present and entry.state() == (0.7,) and steered_of(model) == model.steered
    del model
    assert not entry.present and entry.among({1}) == ()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_steered_like_what_they_came_from(how):
    model = Layers(settings())
    step(model)
    twin = how(model)
    twin.steered = steered_of(twin)
    assert [s.module for s in twin.steered] == [*twin.layers] and all(s in STEERED for s in twin.steered)
    assert all(s.stack is None for s in twin.steered) and model.steered[0].stack is not None
    assert_steps_as_the_oracle(twin.grads(), "adaptive", "residual")


def test_embeddings_are_steered_by_the_transposed_delta():
    model, w = nn.ModuleDict({"embed_tokens": nn.Embedding(OUT, IN)}), prior_weight(3)
    inject_adapter_in_model(LoraConfig(r=R, lora_alpha=6, target_modules=["embed_tokens"]), model)
    layer = model["embed_tokens"]
    p = [lora_factor(layer, factor, "default") for factor in "AB"]
    for i, each in enumerate(p):
        each.data, each.grad = randn(*each.shape, seed=i), randn(*each.shape, seed=5 + i)
    entry = SteeredAdapter(layer, "default", "embed_tokens.weight", settings("gradnorm"), w)
    entry.register()
    assert entry.present and entry.prior["U"].is_contiguous() and entry.prior["Vh"].is_contiguous()
    oracle = Layer(p[0], p[1], 2.0, w.U, w.S, w.Vh, embedding=True)
    expected = oracle.biased(p[0].grad, p[1].grad, 0.7, "gradnorm", "residual")
    torch.optim.SGD(p, lr=0.0).step()
    for each, g in zip(p, expected, strict=True):
        close(each.grad, g, 1e-6)
    with pytest.raises(ValueError, match=r"on an embedding or by target_parameters, such as embed_tokens\.weight"):
        SteeredAdapter(layer, "default", "embed_tokens.weight", settings(drift_norm="weight"), w).register()


def test_adapters_whose_factors_are_not_what_peft_says():
    model = Layers(settings())
    model.layers[0].r["default"] = 2
    with pytest.raises(RuntimeError, match="has rank 2 but 3 rows: prepare_model_for_compiled_hotswap pads it"):
        step(model)
    stacked = Layers(settings())
    for layer in stacked.layers:  # as of target_parameters, where each expert has rows of its own
        layer.r["default"], layer.num_experts = 1, R
    assert len(groups_of(stacked.steered, {*map(id, stacked.trained())})) == 1
    flat = Layers(settings())
    flat.layers[0].lora_A["default"].weight.data = torch.zeros(R * IN)
    with pytest.raises(RuntimeError, match="is flattened: guidance under FSDP1 is not available"):
        flat.steered[0].batch_key()


# What there is in a model


class Text(nn.Module):
    """One projection with a bias and a norm, both under the names that a text model has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(IN, OUT)})})])
        self.norm = nn.LayerNorm(IN)
        self.other = nn.Linear(IN, IN)  # which no text model has
        for name in ("default", "second"):
            config = LoraConfig(r=R, target_modules=["up_proj"], modules_to_save=["norm"])
            inject_adapter_in_model(config, self, name)


def test_layers_of_an_adapter_or_of_the_active_ones():
    model = Text()
    layer = model.layers[0]["mlp"]["up_proj"]
    name = "layers.0.mlp.up_proj.weight"
    layer.set_adapter("second")
    assert [*lora_layers(model)] == [(name, layer, "second")]
    assert [*lora_layers(model, "default")] == [(name, layer, "default")]
    assert [*lora_layers(model, "third")] == []
    assert [*lora_layers(nn.ModuleDict({"model": model}))] == [(name, layer, "second")]  # whatever is around it
    inject_adapter_in_model(LoraConfig(r=R, target_modules=["other"]), model, "third")
    assert [*lora_layers(model, "third")] == [("other.weight", model.other, "third")]  # the model's own name


def test_tensors_that_train():
    model = Text()
    base = model.layers[0]["mlp"]["up_proj"].base_layer
    for p in model.parameters():
        p.requires_grad_(False)
    assert [*trainable_tensors(model)] == []
    saved, kept = model.norm.modules_to_save, model.norm.original_module
    saved["second"].weight.requires_grad_(True)
    base.bias.requires_grad_(True)
    model.other.bias.requires_grad_(True)
    kept.bias.requires_grad_(True)  # which is not what the forward pass uses
    found = [*trainable_tensors(model)]
    assert [each[:3] for each in found] == [
        ("layers.0.mlp.up_proj.bias", base, "bias"),
        ("norm.weight", saved["second"], "weight"),
    ]
    assert found[0][3] is None and torch.equal(found[1][3], kept.weight) and not found[1][3].requires_grad
    base.bias.requires_grad_(False)
    of_one = [each[:3] for each in trainable_tensors(model, "default")]  # active or not
    assert of_one == [("norm.weight", saved["default"], "weight"), ("norm.bias", saved["default"], "bias")]


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
