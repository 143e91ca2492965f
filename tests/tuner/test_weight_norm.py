"""drift_norm="weight": norm and cosine of the weight gradient G, against the dense G of a trainable base weight."""

import copy

import pytest
import torch
from pairs import Pair
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from processes import on_two, replicated
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from twin import (
    BATCH,
    assert_same_update,
    backward,
    oracle_layers,
    pickled,
    sgd,
    state,
    steered,
    train,
    trainable,
    twin_of,
)

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.tuner.capture import _omega

MODES = [(scale, target) for scale in ("gradnorm", "adaptive") for target in ("residual", "delta")]
exact_or_not = pytest.mark.parametrize("sketch", [None, 16])


def weight_normed(pair, scale="adaptive", target="residual", sketch=None, **settings):
    return steered(pair, scale, target, drift_norm="weight", drift_sketch=sketch, **settings)


def layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def dense_step(twin, prior, scale, target, lr=0.05, alpha=0.8, measure=lambda G: G.norm()):
    """One SGD step on the gradients that the paper's g̃ of the full weight gives by the chain rule (identity 5)."""
    twin.zero_grad()
    for layer in layers(twin):
        layer.base_layer.weight.requires_grad_(True)
    backward(twin)
    for layer, oracle in oracle_layers(twin, prior):
        G, X = layer.base_layer.weight.grad.double(), oracle.weight_direction(target)
        cosine = (G * X).sum() / (measure(G) * X.norm())
        a = alpha * ((1 + cosine.clamp(-1, 1)) / 2 if scale == "adaptive" else 1)
        a = a * (min(1, X.norm() / oracle.delta.norm()) if target == "residual" else 1)
        biased = G - a * measure(G) * X / X.norm()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        moves = oracle.s * oracle.B.T @ biased, oracle.s * biased @ oracle.A.T
        with torch.no_grad():
            for p, g in zip((A, B), moves, strict=True):
                p -= lr * g.to(p.dtype)
        layer.base_layer.weight.requires_grad_(False)
    return state(twin)


@pytest.mark.parametrize(("scale", "target"), MODES)
def test_exact_equals_the_papers_gradient_pulled_back(pair, scale, target):
    model = weight_normed(pair, scale, target)
    twin, start = twin_of(pair, model), state(model)
    for _ in range(2):
        train(model, sgd(model), 1)
        expected = dense_step(twin, pair.prior, scale, target)
    assert_same_update(model, expected, start, 1e-5)
    found = telemetry(model)
    assert 0 < found["bias_ratio"] < 1 and -1 < found["gradient_cosine"] < 1


@pytest.mark.parametrize(("scale", "target"), MODES)
def test_sketched_equals_the_formula_with_the_sketched_norm(pair, scale, target):
    """⟨G, X⟩ stays exact; only ‖G‖ is that of G·Ω."""
    model = weight_normed(pair, scale, target, sketch=16)
    twin, start = twin_of(pair, model), state(model)
    train(model, sgd(model), 1)

    def sketched(G):
        return (G @ _omega(G.shape[1], 16, torch.device("cpu"), torch.float64)).norm()

    assert_same_update(model, dense_step(twin, pair.prior, scale, target, measure=sketched), start, 1e-5)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_sketch_errs_as_stated(rank):
    """Relative standard deviation of ‖G·Ω‖²: √(2/m)·‖GᵀG‖_F/‖G‖_F², and no bias, over 400 draws."""
    generator, m = torch.Generator().manual_seed(rank), 64
    errors = []
    for _ in range(400):
        G = torch.randn(24, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
        omega = torch.randn(40, m, generator=generator) / m**0.5  # as _omega draws it
        stated = (2 / m) ** 0.5 * (G.T @ G).norm() / G.norm() ** 2
        errors.append(((G @ omega).norm() ** 2 / G.norm() ** 2 - 1) / stated)
    errors = torch.tensor(errors)
    assert abs(errors.mean()) < 0.2 and 0.85 < errors.std() < 1.15


def test_omega_is_drawn_as_the_statement_assumes():
    omega = _omega(3000, 64, torch.device("cpu"), torch.float32)
    assert torch.equal(omega, _omega(3000, 64, torch.device("cpu"), torch.float32))
    assert omega.mean().abs() < 1e-3 and omega.var() * 64 == pytest.approx(1, abs=0.02)
    assert ((omega @ omega.T).fill_diagonal_(0).square().mean() * 64).item() == pytest.approx(1, abs=0.05)


# Loops: each way of making the same gradient gives the same update


def whole(model, optimizer):
    backward(model)


def in_four(model, optimizer):
    for ids in BATCH.chunk(4):
        backward(model, ids, 1 / 4)


def two_forwards_one_backward(model, optimizer):
    sum(model(input_ids=ids, labels=ids).loss / 2 for ids in BATCH.chunk(2)).backward()


def after_a_discarded_one(model, optimizer):
    backward(model, BATCH.flip(0, 1), 7)
    optimizer.zero_grad()
    backward(model)


def after_one_zeroed_in_place(model, optimizer):
    backward(model, BATCH.flip(0, 1), 7)
    optimizer.zero_grad(set_to_none=False)
    backward(model)


def checkpointed(model, optimizer, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    backward(model)


def checkpointed_reentrant(model, optimizer):
    checkpointed(model, optimizer, True)


WAYS = [in_four, two_forwards_one_backward, after_a_discarded_one, after_one_zeroed_in_place]
WAYS += [checkpointed, checkpointed_reentrant]


@exact_or_not
@pytest.mark.parametrize("way", WAYS)
def test_the_same_gradient_gives_the_same_update(pair, way, sketch):
    model = weight_normed(pair, sketch=sketch)
    other, start = copy.deepcopy(model), state(model)
    for m, make in ((model, whole), (other, way)):
        optimizer = sgd(m)
        for _ in range(3):
            optimizer.zero_grad()
            make(m, optimizer)
            optimizer.step()
    assert_same_update(other, model, start, 1e-5)


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_what_rescales_the_gradient_rescales_the_bias(pair, factor):
    """Clipping, unscaling and averaging after the backward pass: gradnorm and adaptive are homogeneous."""
    model = weight_normed(pair, sketch=16)
    other, start = copy.deepcopy(model), state(model)
    train(model, sgd(model, 0.05 * factor), 1)
    backward(other)
    for p in trainable(other):
        p.grad *= factor
    sgd(other).step()
    assert_same_update(other, model, start, 1e-5)


def test_dropout_is_seen(pair):
    """With dropout, G is of the dropped-out input: the captured s·G·Aᵀ is lora_B's gradient."""
    model = weight_normed(pair, sketch=8, lora_dropout=0.5)
    backward(model)
    for layer in layers(model):
        seen = layer.drift_peft["default"].capture.sums[:, 8:].double()
        torch.testing.assert_close(seen, layer.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Switched off bitsandbytes")
def test_on_a_4bit_base(pair):
    def load():
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return LlamaForCausalLM.from_pretrained(pair.folder / "base", quantization_config=bits)

    model = weight_normed(Pair(pair.folder, load(), {}), dtype=torch.float32)
    lora = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    twin = steered(Pair(pair.folder, load().dequantize(), {}), dtype=torch.float32)  # its own guidance does not run
    twin.load_state_dict(lora, strict=False)
    start = state(model)
    train(model, sgd(model), 1)
    assert_same_update(model, dense_step(twin, pair.prior, "adaptive", "residual"), start, 1e-3)


def worker(rank, folder):
    pair = Pair(folder, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), {})
    model = weight_normed(pair, sketch=16)
    wrapped, optimizer = DistributedDataParallel(model), sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        one, two = BATCH.chunk(2)[rank].chunk(2)
        with wrapped.no_sync():
            backward(wrapped, one, 1 / 2)
        backward(wrapped, two, 1 / 2)
        optimizer.step()
    trained = state(model)
    model = weight_normed(pair, sketch=16)
    wrapped, optimizer = DistributedDataParallel(model), sgd(model)
    with wrapped.join():  # torch never takes back that it was on
        pass
    train(wrapped, optimizer, 2)
    with pytest.raises(RuntimeError, match="exhausted"), wrapped.join(throw_on_early_termination=True):
        train(wrapped, optimizer, 2 - rank)
    assert telemetry(model)["guided_steps"] == 3
    return trained


def test_two_processes_equal_one(pair):
    one, other = on_two(worker, pair.folder)
    model = weight_normed(pair, sketch=16)
    start = state(model)
    train(model, sgd(model), 2)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_update(one, model, start, 1e-5)


# The life of the taps


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_have_taps_of_their_own(pair, how):
    model = weight_normed(pair)
    twin, start = twin_of(pair, model), state(model)
    backward(model)  # the copy must not inherit half a step
    clone = how(model)
    expected = dense_step(twin, pair.prior, "adaptive", "residual")
    for m in (clone, model):
        train(m, sgd(m), 1)
        assert_same_update(m, expected, start, 1e-5)


def taps(model):
    hooks = [
        *(layer.lora_A[a]._forward_pre_hooks for layer in layers(model) for a in layer.lora_A),
        *(layer.lora_B[a]._forward_hooks for layer in layers(model) for a in layer.lora_B),
    ]
    return sum(map(len, hooks))


def test_taps_are_there_only_while_they_serve(pair):
    model = weight_normed(pair)
    assert taps(model) == 2 * 14
    plain = twin_of(pair, model)
    for norm, expected in (("weight", 28), ("weight", 28), ("factor", 0)):
        guide(plain, pair.prior, drift_norm=norm)
        assert taps(plain) == expected
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("default")
    assert taps(model) == 0
    with torch.no_grad():
        weight_normed(pair)(input_ids=BATCH)  # evaluation leaves nothing behind


def test_refusals(pair, monkeypatch):
    with pytest.raises(ValueError, match=r"drift_norm=.weight. compares the weight gradient .* set drift_target="):
        DriftConfig(prior=pair.path, drift_norm="weight", drift_target="factors")
    frozen = weight_normed(pair)
    for name, p in frozen.named_parameters():
        p.requires_grad_("lora_A" in name)
    with pytest.raises(RuntimeError, match="needs lora_B to be trained"):
        train(frozen, sgd(frozen), 1)
    several = weight_normed(pair)
    several.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    several.base_model.set_adapter(["default", "second"])
    several.double()
    with pytest.raises(RuntimeError, match="not available while several adapters are active"):
        train(several, sgd(several), 1)
    replica, _ = replicated(weight_normed(pair), monkeypatch)
    with pytest.raises(RuntimeError, match="not available under DataParallel, whose replicas run at the same time"):
        replica(input_ids=BATCH)
    unseen = weight_normed(pair)
    for p in trainable(unseen):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"saw no backward pass through the adapter of layers\.0\.self_attn\.q_proj"):
        sgd(unseen).step()
