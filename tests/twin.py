"""A steered model and its twin: plain LoRA with the same weights, whose gradients the oracle of reference.py biases."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from reference import Layer, norm

from drift_peft import DriftConfig

ALPHA = {"absolute": 0.3, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 4.0}
MODES = [(scale, target) for scale in list(ALPHA)[:3] for target in ("residual", "delta", "factors")]
MODES += [("decoupled", "factors")]
three_modes = pytest.mark.parametrize(
    ("scale", "target"), [("absolute", "factors"), ("gradnorm", "residual"), ("decoupled", "factors")]
)
every_mode = pytest.mark.parametrize(("scale", "target"), MODES)
BATCH = torch.randint(7, 64, (8, 10), generator=torch.Generator().manual_seed(0))


def randomized(model, seed=0, dtype=torch.float64):
    """Factors as in the middle of training, so that both have gradients and directions."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.to(dtype).train()


def steered(pair, scale="adaptive", target="residual", dtype=torch.float64, prior=None, **settings):
    settings = {"r": 4, "lora_alpha": 6, "drift_alpha": ALPHA[scale], **settings}
    config = DriftConfig(prior=prior or pair.path, drift_scale=scale, drift_target=target, **settings)
    return randomized(get_peft_model(copy.deepcopy(pair.base), config), dtype=dtype)


def twin_of(pair, model):
    lora = {key: getattr(model.peft_config["default"], key) for key in LoraConfig.__dataclass_fields__}
    lora |= {"init_lora_weights": True, "peft_type": "LORA"}
    twin = get_peft_model(copy.deepcopy(pair.base), LoraConfig(**lora))
    twin.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return twin.train()


def oracle_layers(model, prior, rank=None, adapter="default"):
    """(LoRA layer, its oracle) for all layers with a Δ."""
    for name, module in model.named_modules():
        name = re.sub(r"^.*?(?=layers\.)", "", name) + ".weight"
        if isinstance(module, LoraLayer) and adapter in module.lora_A and name in prior:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            others = [
                (module.lora_A[o].weight, module.lora_B[o].weight, module.scaling[o])
                for o in module.active_adapters
                if o != adapter and o in module.lora_A
            ]
            w = prior[name]
            yield module, Layer(A, B, module.scaling[adapter], w.U, w.S, w.Vh, rank=rank, others=others)


def bias_by_oracle(model, prior, scale, target, only=None, adapter="default", rank=None):
    if scale == "decoupled":
        return
    biased = []
    for module, layer in oracle_layers(model, prior, rank, adapter):
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B)]
        biased += zip((A, B), layer.biased(*grads, ALPHA[scale], scale, target), strict=True)
    for p, g in biased:
        if p.grad is not None and (only is None or any(p is q for q in only)):
            p.grad.copy_(g)


def pull_by_oracle(model, prior, scale, optimizer, rank=None):
    if scale != "decoupled":
        return
    for module, layer in oracle_layers(model, prior, rank):
        for group in optimizer.param_groups:
            pulled = layer.pulled(float(group["lr"]), ALPHA[scale])
            factors = module.lora_A["default"].weight, module.lora_B["default"].weight
            for p, value in zip(factors, pulled, strict=True):
                if p.grad is not None and any(p is q for q in group["params"]):
                    p.data.copy_(value)


def backward(model, ids=BATCH, share=1.0):
    loss = model(input_ids=ids, labels=ids).loss * share
    loss.backward()
    return loss


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model, lr=0.05):
    return torch.optim.SGD(trainable(model), lr=lr)


def train(model, optimizer, steps=2, backward=backward):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def train_by_oracle(twin, optimizer, prior, scale, target, steps=2, backward=backward, rank=None):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(twin)
        bias_by_oracle(twin, prior, scale, target, rank=rank)
        optimizer.step()
        pull_by_oracle(twin, prior, scale, optimizer, rank)


def state(model):
    return {n: p.detach().clone().double() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_update(model, expected, start, tolerance=1e-6):
    """Every parameter moved as in `expected`, up to a part `tolerance` of its movement."""
    model, expected = (m if isinstance(m, dict) else state(m) for m in (model, expected))
    assert model.keys() == expected.keys() == start.keys()
    for name in start:
        moved, off = norm(expected[name] - start[name]), norm(model[name] - expected[name])
        assert off <= tolerance * moved, f"{name} moved by {moved:.3g} and is off by {off:.3g}"


def assert_guided_like_oracle(pair, make_optimizer, scale="adaptive", target="residual", tolerance=1e-6, **options):
    """Train a steered model and its twin the same way; and see that plain LoRA would have gone elsewhere."""
    settings = {key: options.pop(key) for key in set(options) - {"steps", "backward"}}
    model = steered(pair, scale, target, **settings)
    twin, plain, start = twin_of(pair, model), twin_of(pair, model), state(model)
    train(model, make_optimizer(model), **options)
    train(plain, make_optimizer(plain), **options)
    options["rank"] = settings.get("drift_rank")
    train_by_oracle(twin, make_optimizer(twin), pair.prior, scale, target, **options)
    assert_same_update(model, twin, start, tolerance)
    with pytest.raises(AssertionError):
        assert_same_update(plain, twin, start, 0.05)
