"""batches.py and step.py at their lowest level: what a step adds to given gradients, against the oracle."""

import copy

import pytest
import torch
from steered_layers import (
    IN,
    OUT,
    SCALES,
    Discarding,
    Layers,
    R,
    Tensors,
    assert_steps_as_the_oracle,
    close,
    every_mode,
    settings,
    step,
)

from drift_peft import DriftConfig
from drift_peft.prior import PriorWeight
from drift_peft.tuner import batches, steered
from drift_peft.tuner.batches import bias_gradients, groups_of, pull_parameters
from drift_peft.tuner.steered import (
    lora_factor,
)

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


def test_the_numbers_of_a_gradscaler_come_to_the_layers():
    """It keeps them on one device, and the layers may be on several. Here meta stands for another one."""
    model = Layers(settings("absolute", drift_warmup_steps=5), count=1)
    trained = [p.to("meta") for p in model.trained()]
    (group,) = groups_of(model.steered, {*map(id, model.trained())})
    group.parameters = dict(zip(group.parameters, ([p] for p in trained), strict=True))
    group.config.iteration = torch.tensor(2)
    batch = group.batch()
    assert batch.alpha.device == batch.strength(torch.tensor(8.0)).device == batch.here(torch.ones(())).device
    assert batch.alpha.device.type == "meta"
    assert batch.rates("A", {id(trained[0]): torch.tensor(1e-3)}).device.type == "meta"


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


# Tensors that are trained themselves


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


def test_what_is_measured_of_bf16_tensors_is_as_exact_as_of_others():
    model = Tensors(settings("gradnorm", "delta"), dtype=torch.bfloat16)
    grads = [p.grad.double() for p in model.trained()]
    step(model)
    cosines, ratios = model.steered[0].stack.last_step()
    for cosine, ratio, g, D in zip(cosines, ratios, grads, model.deltas, strict=True):
        close(cosine, torch.cosine_similarity(g.flatten(), D.flatten(), dim=0), 1e-6)
        close(ratio, torch.tensor(0.7), 1e-6)


def test_batches_of_tensors(monkeypatch):
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", 2 * OUT * IN)
    model = Tensors(settings(), count=3)
    assert [len(g.parameters["W"]) for g in groups_of(model.steered, {*map(id, model.trained())})] == [2, 1]
    monkeypatch.setattr(steered, "BATCH_ELEMENTS", 1)
    assert [len(g.parameters["W"]) for g in groups_of(model.steered, {*map(id, model.trained())})] == [1, 1, 1]
    alone = Tensors(settings(), count=1)
    assert len(groups_of(alone.steered, {*map(id, alone.trained())})) == 1
    assert [(s.adapter, s.name) for s in model.steered] == [("default", f"layers.{i}.norm.weight") for i in range(3)]
