"""A steered model and its twin: plain LoRA with the same weights, whose gradients the oracle of reference.py biases."""

import copy
import io
import re
import warnings

import pytest
import torch
from pairs import Pair
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from reference import Layer, Whole, norm, spectrum
from tiny import tiny_llm

from drift_peft import DriftConfig, guide
from drift_peft.prior.file import FORMAT, partial_output, write_prior

ALPHA = {"absolute": 0.3, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 4.0}
MODES = [(scale, target) for scale in list(ALPHA)[:3] for target in ("residual", "delta", "factors")]
MODES += [("decoupled", "factors")]
three_modes = pytest.mark.parametrize(
    ("scale", "target"), [("absolute", "factors"), ("gradnorm", "residual"), ("decoupled", "factors")]
)
every_mode = pytest.mark.parametrize(("scale", "target"), MODES)
each_scale = pytest.mark.parametrize(
    ("scale", "target"),
    [("absolute", "residual"), ("gradnorm", "delta"), ("adaptive", "residual"), ("decoupled", "factors")],
)
BATCH = torch.randint(7, 64, (8, 10), generator=torch.Generator().manual_seed(0))


def pickled(model):
    """Saved whole, and loaded again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def randomized(model, seed=0, dtype=torch.float64):
    """Factors as in the middle of training, so that both have gradients and directions."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.to(dtype).train()


def make_whole_pair(folder, **changes):
    """A tiny Llama with biases and a prior of rank 8 for every tensor of it, norms and biases as they are."""
    settings = {"attention_bias": True, "mlp_bias": True, "vocab_size": 72, **changes}
    base = tiny_llm("llava", **settings)
    generator = torch.Generator().manual_seed(3)
    tensors, weights = {}, {}
    for W in base.parameters():
        if W.dim() == 1:
            W.data += 0.1 * torch.randn(W.shape, generator=generator)  # biases are 0 and norms 1 in a new model
    for name, W in base.named_parameters(remove_duplicate=False):
        name, W = canonical(name), W.detach()
        delta = 0.3 * W.std() * torch.randn(W.shape, generator=generator)
        stats = {"shape": list(W.shape), "delta_norm": norm(delta), "base_norm": norm(W), "cosine": 0.9, "energy": 1.0}
        if W.dim() == 1:
            tensors[f"{name}.delta"] = delta
        else:
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            parts = {"U": U[:, :8].bfloat16(), "S": S[:8].clone(), "Vh": Vh[:8].bfloat16()}
            tensors |= {f"{name}.{key}": part.contiguous() for key, part in parts.items()}
            fingerprint = ((parts["U"].float().T @ W) * parts["Vh"].float()).sum(-1).tolist()
            stats |= {"rank": 8, "fingerprint": fingerprint}
        weights[name] = stats
    metadata = {
        "format": FORMAT,
        "expert": {"id": "expert", "revision": None},
        "base": {"id": "base", "revision": None},
        "reference": None,
        "rank": 8,
        "dtype": "bfloat16",
        "seed": 0,
    }
    metadata |= {"modules": ["attn", "mlp", "norm", "bias", "head", "embed"], "not_steered": [], "weights": weights}
    with partial_output(folder / "prior.safetensors") as partial:
        write_prior(partial, folder / "prior.safetensors", tensors, metadata)
    return Pair(folder, base, {})


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


def canonical(name):
    """As the text LLM names it, whatever PEFT has wrapped around it."""
    name = re.sub(r"^.*?(?=(?:layers|embed_tokens|norm|lm_head)\.)", "", name)
    return name.replace("base_layer.", "").replace("modules_to_save.default.", "")


def oracle_layers(model, prior, rank=None, adapter="default", power=1.0):
    """(LoRA layer, its oracle) for all layers with a Δ."""
    for name, module in model.named_modules():
        name = canonical(f"{name}.weight")
        if isinstance(module, LoraLayer) and adapter in module.r and name in prior:
            others = [
                (*factors(module, o), module.scaling[o])
                for o in module.active_adapters
                if o != adapter and o in module.r
            ]
            w, embedding = prior[name], adapter in module.lora_embedding_A
            A, B = factors(module, adapter)
            yield module, Layer(A, B, module.scaling[adapter], w.U, w.S, w.Vh, rank, others, power, embedding)


def factors(layer, adapter="default"):
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def oracles(model, prior, start=None, adapter="default", rank=None, power=1.0):
    """(canonical name, parameters, oracle) of everything with a Δ; `start` holds W_0 of tensors trained themselves."""
    names = {module: name for name, module in model.named_modules()}
    for layer, oracle in oracle_layers(model, prior, rank, adapter, power):
        yield canonical(f"{names[layer]}.weight"), factors(layer, adapter), oracle
    for name, p in model.named_parameters():
        if start is not None and name in start and "lora_" not in name and canonical(name) in prior:
            w = prior[canonical(name)]
            delta = w.delta if hasattr(w, "delta") else w.U[:, :rank].double() * spectrum(w.S[:rank], power)
            delta = delta if hasattr(w, "delta") else delta @ w.Vh[:rank].double()
            yield canonical(name), (p,), Whole(p, start[name], delta)


def bias_by_oracle(model, prior, scale, target, only=None, alpha=None, **which):
    """`alpha`: canonical name -> strength, for those that are not all alike."""
    if scale == "decoupled":
        return
    biased = []
    for name, parameters, oracle in oracles(model, prior, **which):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        a = alpha(name) if alpha else ALPHA[scale]
        biased += zip(parameters, oracle.biased(*grads, a, scale, target), strict=True)
    for p, g in biased:
        if p.grad is not None and (only is None or any(p is q for q in only)):
            p.grad.copy_(g)


def pull_by_oracle(model, prior, scale, optimizer, target="factors", alpha=None, **which):
    if scale != "decoupled":
        return
    for name, parameters, oracle in oracles(model, prior, **which):
        for group in optimizer.param_groups:
            lr, a = float(group["lr"]), alpha(name) if alpha else ALPHA[scale]
            for p, value in zip(parameters, oracle.pulled(lr, a, target), strict=True):
                if p.grad is not None and any(p is q for q in group["params"]):
                    if "train_mode" in group:  # schedule-free: its other weights go as large a part of the way
                        z = optimizer.state[p]["z"]
                        z.add_(value - p.data + lr * a * (p.data - z))
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


def train_by_oracle(twin, optimizer, prior, scale, target, steps=2, backward=backward, alpha=None, **which):
    """`alpha`: (canonical name, step) -> strength. `which` goes to `oracles`."""
    for step in range(steps):
        strength = alpha and (lambda name, step=step: alpha(name, step))
        optimizer.zero_grad()
        backward(twin)
        bias_by_oracle(twin, prior, scale, target, alpha=strength, **which)
        optimizer.step()
        pull_by_oracle(twin, prior, scale, optimizer, target, strength, **which)


def state(model):
    return {n: p.detach().clone().double() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_update(model, expected, start, tolerance=1e-6):
    """Every parameter moved as in `expected`, up to a part `tolerance` of its movement."""
    model, expected = (m if isinstance(m, dict) else state(m) for m in (model, expected))
    assert model.keys() == expected.keys() == start.keys()
    for name in start:
        moved, off = norm(expected[name] - start[name]), norm(model[name] - expected[name])
        assert off <= tolerance * moved, f"{name} moved by {moved:.3g} and is off by {off:.3g}"


def assert_guided_like_oracle(
    pair, make_optimizer, scale="adaptive", target="residual", tolerance=1e-6, model=None, oracle=None, **options
):
    """Train a steered model and its twin the same way; and see that plain LoRA would have gone elsewhere.

    `oracle` has what `train_by_oracle` has to know of the settings; the further `options` that are not `steps` and
    `backward` are settings.
    """
    settings = {key: options.pop(key) for key in set(options) - {"steps", "backward"}}
    model = steered(pair, scale, target, **settings) if model is None else model
    twin, start = twin_of(pair, model), state(model)
    plain = copy.deepcopy(twin)
    train(model, make_optimizer(model), **options)
    train(plain, make_optimizer(plain), **options)
    which = {"rank": settings.get("drift_rank"), "start": start, **(oracle or {})}
    train_by_oracle(twin, make_optimizer(twin), pair.prior, scale, target, **options, **which)
    assert_same_update(model, twin, start, tolerance)
    with pytest.raises(AssertionError):
        assert_same_update(plain, twin, start, 0.05)
    return model


def assert_copies_guided_like_oracle(model, pair):
    """guide() pulls a stock adapter's modules to save toward Δ − (W − W_0), W_0 the base's, wherever they are."""
    start = state(model)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data += 0.1
    twin, now = copy.deepcopy(model), state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        guide(model, pair.prior, drift_alpha=ALPHA["adaptive"])
    train(model, sgd(model))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual", start=start)
    assert_same_update(model, twin, now)
