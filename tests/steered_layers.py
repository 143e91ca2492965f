"""A few layers without a model around them, whose gradients are given, and what the oracle makes of them."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from reference import Layer, Whole
from torch import nn

from drift_peft import DriftConfig
from drift_peft.prior import PriorVector, PriorWeight
from drift_peft.tuner.steered import (
    SteeredAdapter,
    SteeredTensor,
    lora_factor,
)

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


class Discarding(torch.optim.Optimizer):
    """Its step takes the gradients of all but the first layer away, as some do that are done with them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.param_groups[0]["params"]):
            p -= 0.1 * p.grad
            p.grad = p.grad if i < 2 else None


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
