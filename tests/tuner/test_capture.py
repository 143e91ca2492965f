"""capture.py at its lowest level: one adapted layer, whose dense G autograd gives, and what the sums make of it."""

import copy

import pytest
import torch
from steered_layers import IN, OUT, R, close, forward, randn, weighted

from drift_peft.tuner.capture import Capture, _omega, weight_gradient
from drift_peft.tuner.steered import lora_factor


def layer_of(sketch=None, dtype=torch.float64):
    model = weighted(count=1)
    model.config.drift_sketch = sketch
    entry = model.steer(0)
    layer = model.layers[0].to(dtype)
    layer.base_layer.weight.requires_grad_(True)
    entry.model = model  # which lives as long as its entry here
    return entry, layer


def backward(layer, seed, share=1.0, dtype=torch.float64):
    """A loss of two sequences of three tokens."""
    (share * layer(randn(2, 3, IN, seed=seed).to(dtype)).tanh().square().sum()).backward()


def measured(entry, layer):
    g_B = lora_factor(layer, "B", "default").grad
    s = torch.tensor([layer.scaling["default"]], dtype=g_B.dtype)
    return weight_gradient([entry.capture], g_B[None], R, s)


def assert_measures(entry, layer, G=None, tolerance=1e-5):
    """‖G‖ and ⟨G, Δ_r⟩ of the dense G."""
    G = layer.base_layer.weight.grad if G is None else G
    U, S, Vh = (entry.prior[key].double() for key in ("U", "S", "Vh"))
    for found, expected in zip(measured(entry, layer), (G.double().norm(), (G * (U * S @ Vh)).sum()), strict=True):
        close(found[0], expected, tolerance * (1 + abs(expected)))


def test_passes_add_up_until_the_gradients_are_discarded():
    entry, layer = layer_of()
    for i, discard in enumerate((layer.zero_grad, lambda: layer.zero_grad(set_to_none=False), lambda: None)):
        backward(layer, 2 * i)
        backward(layer, 2 * i + 1)
        assert_measures(entry, layer)
        discard()
    entry.capture.stale = True  # a step took them
    layer.zero_grad()
    backward(layer, 9)
    assert_measures(entry, layer)
    assert entry.capture.sums.dtype == torch.float64 and entry.capture.sums.shape == (OUT, IN + R)


def test_forward_passes_of_one_backward_pass_belong_together():
    entry, layer = layer_of()
    for _ in range(2):
        layer.zero_grad()
        x, y = randn(4, IN, seed=1), randn(4, IN, seed=2)
        (layer(x).tanh().square().sum() + layer(y).sin().sum()).backward()
        assert_measures(entry, layer)


def test_what_a_step_leaves_is_not_counted_again():
    entry, layer = layer_of()
    backward(layer, 1)
    before = layer.base_layer.weight.grad.clone()
    entry.capture.stale = True
    with pytest.raises(RuntimeError, match="saw no backward pass through the adapter of layers"):
        measured(entry, layer)
    layer.zero_grad()
    backward(layer, 2)
    assert_measures(entry, layer)
    assert not torch.equal(layer.base_layer.weight.grad, before)


def test_a_step_that_leaves_its_gradients_there_ends_its_sums():
    entry, layer = layer_of()
    backward(layer, 1)
    entry.capture.stale = True
    backward(layer, 2)
    of_both_steps, (second, _) = entry.capture.sums, layer_of()
    second.module.load_state_dict(layer.state_dict())
    backward(second.module, 2)
    assert torch.equal(of_both_steps, second.capture.sums)


def test_several_layers_at_once():
    """Each with a scaling of its own, and in a gradient that the step finds larger or smaller, or turned around."""
    model = weighted(count=3)
    dense, g_B = forward(model), [lora_factor(layer, "B", "default").grad for layer in model.layers]
    factors = torch.tensor([0.01, 7.0, -1.0], dtype=torch.float64)
    s = torch.tensor([layer.scaling["default"] for layer in model.layers], dtype=torch.float64)
    captures = [entry.capture for entry in model.steered]
    norm, inner = weight_gradient(captures, torch.stack(g_B) * factors[:, None, None], R, s)
    deltas = [oracle.delta for oracle in model.oracles()]
    close(norm, torch.stack([G.norm() for G in dense]) * factors.abs(), 1e-5)
    close(inner, torch.stack([(G * D).sum() for G, D in zip(dense, deltas, strict=True)]) * factors, 1e-4)


@pytest.mark.parametrize("factor", [3.0, 0.01, -2.0, 1e-30])
def test_what_rescales_the_gradient_rescales_the_sums(factor):
    entry, layer = layer_of()
    backward(layer, 1)
    for p in (lora_factor(layer, "B", "default"), layer.base_layer.weight):
        p.grad.mul_(factor)
    G = layer.base_layer.weight.grad
    U, S, Vh = (entry.prior[key].double() for key in ("U", "S", "Vh"))
    norm, inner = measured(entry, layer)
    close(norm[0] / abs(factor), G.norm() / abs(factor), 1e-5)
    close(inner[0] / factor, (G * (U * S @ Vh)).sum() / factor, 1e-5)


def test_a_small_gradient_is_measured_as_a_large_one():
    entry, layer = layer_of()
    backward(layer, 1, share=1e-6)
    close(1e6 * measured(entry, layer)[0][0], 1e6 * layer.base_layer.weight.grad.norm(), 1e-5)


def test_without_any_gradient_there_is_none():
    entry, layer = layer_of()
    backward(layer, 1, share=0.0)
    norm, inner = measured(entry, layer)
    assert norm.tolist() == inner.tolist() == [0.0]


def test_where_lora_a_is_zero_nothing_can_be_said():
    entry, layer = layer_of()
    torch.nn.init.zeros_(lora_factor(layer, "A", "default"))
    backward(layer, 1)
    assert entry.capture.sums.any() and [x.tolist() for x in measured(entry, layer)] == [[0.0], [0.0]]


def test_a_sketch_replaces_the_norm_alone():
    entry, layer = layer_of(sketch=2)
    backward(layer, 1)
    G = layer.base_layer.weight.grad
    omega = _omega(IN, 2, torch.device("cpu"), torch.float64)
    norm, inner = measured(entry, layer)
    close(norm[0], (G @ omega).norm(), 1e-5)
    U, S, Vh = (entry.prior[key].double() for key in ("U", "S", "Vh"))
    close(inner[0], (G * (U * S @ Vh)).sum(), 1e-4)
    assert entry.capture.sums.shape == (OUT, 2 + R) and entry.capture.sketch == 2


def test_omega():
    cpu = torch.device("cpu")
    omega = _omega(400, 50, cpu, torch.float64)
    assert omega.shape == (400, 50) and omega.dtype == torch.float64
    assert float(omega.var()) == pytest.approx(1 / 50, rel=0.03) and abs(float(omega.mean())) < 0.003
    _omega.cache_clear()
    assert torch.equal(_omega(400, 50, cpu, torch.float64), omega)  # in every process
    assert not torch.equal(_omega(401, 50, cpu, torch.float64)[:400], omega)


@pytest.mark.parametrize("sketch", [None, 2])
def test_bf16(sketch):
    entry, layer = layer_of(sketch, torch.bfloat16)
    backward(layer, 1, dtype=torch.bfloat16)
    assert entry.capture.sums.dtype == entry.capture.inner.dtype == torch.float32
    if sketch is None:
        assert_measures(entry, layer, tolerance=0.05)


def test_fp16_under_a_loss_scale():
    """What fp16 can hold is measured, though the sum of it is beyond fp16."""
    entry, layer = layer_of(dtype=torch.float16)
    layer.base_layer.weight.requires_grad_(False)
    (layer(torch.full((2, 3, IN), 30.0, dtype=torch.float16)) * 2000).sum().backward()
    U, S, Vh = (entry.prior[key].double() for key in ("U", "S", "Vh"))
    expected = (torch.full((OUT, IN), 6 * 30.0 * 2000, dtype=torch.float64) * (U * S @ Vh)).sum()
    assert abs(expected) > torch.finfo(torch.float16).max
    close(entry.capture.inner, expected, 0.02 * abs(expected))


@pytest.mark.parametrize("sketch", [None, 2])
def test_the_weights_norm_in_fp16_under_a_loss_scale(sketch):
    """lora_B's gradient is what fp16 can hold, and sums over more than lora_A has rows are beyond it."""
    entry, layer = layer_of(sketch, torch.float16)
    lora_factor(layer, "A", "default").data *= 1e-3
    layer.base_layer.weight.requires_grad_(False)
    (layer(torch.full((2, 3, IN), 30.0, dtype=torch.float16)) * 2000).sum().backward()
    assert lora_factor(layer, "B", "default").grad.isfinite().all() and entry.capture.sums.isfinite().all()
    if sketch is None:
        close(entry.capture.sums[:, :IN], torch.full((OUT, IN), 6 * 30.0 * 2000.0), 1e-3 * 6 * 30.0 * 2000.0)


def test_evaluation_and_frozen_factors_leave_nothing():
    entry, layer = layer_of()
    with torch.no_grad():
        layer(randn(2, IN))
    assert entry.capture.x is None and entry.capture.sums is None and entry.capture.stale
    for factor in "AB":
        lora_factor(layer, factor, "default").requires_grad_(False)
    layer(randn(2, IN)).sum().backward()
    assert entry.capture.sums is None and entry.capture.x is None
    x = randn(2, IN)
    with torch.no_grad():
        entry.capture.see_input(layer, (x,))
    assert entry.capture.x is None  # not even until the output comes
    entry.capture.see_input(layer, (x,))
    assert entry.capture.see_output(layer, (x,), x) is None  # which stays as it is


def test_one_that_never_listened_holds_nothing():
    capture = Capture("name", lambda factor: None, {}, None)
    capture.remove()
    assert capture.x is None and capture.sums is None and capture.inner is None and capture.stale


def test_a_copy_starts_sums_of_its_own():
    entry, layer = layer_of()
    backward(layer, 1)
    entry.capture.x = randn(1)  # as between the two hooks of a forward pass
    capture = copy.copy(entry.capture)
    assert (capture.x, capture.sums, capture.inner, capture.stale) == (None, None, None, True)
    assert capture.sketch is None and capture.name == entry.capture.name and entry.capture.sums is not None


def test_the_tap_is_the_identity():
    entry, layer = layer_of()
    taps = entry.capture.handles
    plain = copy.deepcopy(layer)
    plain.drift_peft["default"].release()
    x = randn(2, 3, IN, seed=4)
    for each in (layer, plain):
        each.zero_grad()
        each(x).tanh().square().sum().backward()
    assert len(taps) == 2 and torch.equal(layer(x), plain(x))
    for factor in "AB":
        assert torch.equal(lora_factor(layer, factor, "default").grad, lora_factor(plain, factor, "default").grad)


def test_under_autocast():
    entry, layer = layer_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(randn(2, 3, IN, seed=1).float())
    y.float().tanh().square().sum().backward()
    assert_measures(entry, layer, tolerance=0.05)


def test_processes_add_their_sums(monkeypatch):
    entry, layer = layer_of()
    backward(layer, 1)
    G = layer.base_layer.weight.grad
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))  # two that saw the same
    assert_measures(entry, layer, G)  # the step's gradient is their mean
