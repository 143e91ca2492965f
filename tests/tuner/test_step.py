"""The hooks with real optimizers on a real PEFT model: every step is the oracle's, whatever the training loop."""

import copy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from pairs import Pair
from peft.tuners.lora import LoraLayer
from processes import on_two
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from twin import (
    BATCH,
    assert_guided_like_oracle,
    assert_same_update,
    backward,
    each_scale,
    every_mode,
    sgd,
    state,
    steered,
    three_modes,
    train,
    train_by_oracle,
    trainable,
    twin_of,
)

import drift_peft.tuner.steered
from drift_peft import guide, telemetry
from drift_peft.tuner.deepspeed import ENGINE

# Modes


@every_mode
def test_every_mode_steps_as_the_oracle(pair, scale, target):
    assert_guided_like_oracle(pair, sgd, scale, target)


@pytest.mark.parametrize("drift_rank", [1, 3, 8])
def test_drift_rank(pair, drift_rank):
    assert_guided_like_oracle(pair, sgd, "gradnorm", "residual", drift_rank=drift_rank)
    assert_guided_like_oracle(pair, sgd, "absolute", "delta", drift_rank=drift_rank)


@pytest.mark.parametrize("elements", [1, 600])
def test_layers_in_more_than_one_batch(pair, monkeypatch, elements):
    monkeypatch.setattr(drift_peft.tuner.steered, "BATCH_ELEMENTS", elements)
    assert_guided_like_oracle(pair, sgd)
    assert_guided_like_oracle(pair, sgd, "decoupled", "factors")


def test_drift_rank_above_the_priors(pair):
    with pytest.warns(UserWarning, match=r"drift_rank=20 is more than the prior holds for 14 weights, such as layers"):
        assert_guided_like_oracle(pair, sgd, drift_rank=20)


@pytest.mark.filterwarnings("ignore:On 14 layers the prior's rank is below the adapter's")
@pytest.mark.parametrize(("scale", "target"), [("absolute", "residual"), ("gradnorm", "delta")])
def test_adapter_rank_above_the_priors(pair, scale, target):
    assert_guided_like_oracle(pair, sgd, scale, target, r=12)


@three_modes
def test_ranks_and_scalings_that_differ_between_layers(pair, scale, target):
    patterns = {"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"layers.1.mlp.down_proj": 1}}
    assert_guided_like_oracle(pair, sgd, scale, target, use_rslora=True, **patterns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_scale
def test_parameters_of_lower_precision(pair, scale, target, dtype):
    """One step; of bf16 parameters the gradient too is rounded to 8 bits, but norms are fp32."""
    model = steered(pair, scale, target, dtype=dtype)
    twin, start = twin_of(pair, model), state(model)
    train(model, sgd(model, lr=8.0), 1)
    train_by_oracle(twin, sgd(twin, lr=8.0), pair.prior, scale, target, 1)
    assert_same_update(model, twin, start, {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


def test_bf16_autocast(pair):
    def backward_in_bf16(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=BATCH, labels=BATCH).loss
        loss.backward()

    assert_guided_like_oracle(pair, sgd, dtype=torch.float32, tolerance=1e-2, backward=backward_in_bf16)


@pytest.mark.parametrize("scale", ["absolute", "adaptive"])
def test_clipping_before_the_step(pair, scale):
    """What is biased is the clipped gradient: for `absolute` the order matters."""

    def backward_and_clip(model):
        backward(model)
        assert torch.nn.utils.clip_grad_norm_(trainable(model), 0.1) > 0.2

    assert_guided_like_oracle(pair, sgd, scale, backward=backward_and_clip)


# Nothing but what is steered


@pytest.mark.parametrize(("scale", "target"), [("gradnorm", "residual"), ("decoupled", "factors")])
def test_unsteered_parameters_step_bitwise_as_plain(pair, scale, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "… have no Δ in the prior"
        model = steered(
            pair, scale, target, prior=pair.folder / "attn.safetensors", target_modules=["q_proj", "up_proj"],
            modules_to_save=["lm_head"],
        )  # fmt: skip
    twin = twin_of(pair, model)
    train(model, sgd(model), 1)
    train(twin, sgd(twin), 1)
    got, plain = state(model), state(twin)
    assert len(got) == 4 + 4 + 1
    for name in got:
        assert torch.equal(got[name], plain[name]) == ("q_proj" not in name)


@three_modes
def test_zero_strength_is_bitwise_plain_lora(pair, scale, target):
    model = steered(pair, scale, target, dtype=torch.float32, drift_alpha=0.0)
    twin = twin_of(pair, model)
    for m in (model, twin):
        train(m, torch.optim.AdamW(trainable(m), lr=0.02), 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert telemetry(model)["guided_steps"] == 0


@three_modes
@pytest.mark.parametrize("missing", ["lora_A", "lora_B", "layers.0", "q_proj"])
def test_parameters_without_a_gradient_are_skipped(pair, scale, target, missing):
    model = steered(pair, scale, target)
    for name, p in model.named_parameters():
        p.requires_grad &= missing not in name
    twin = twin_of(pair, model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.requires_grad = p.requires_grad
    frozen = {n: p.clone() for n, p in model.named_parameters() if missing in n}
    start = state(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05))
    train_by_oracle(twin, torch.optim.SGD(twin.parameters(), lr=0.05), pair.prior, scale, target)
    assert_same_update(model, twin, start)
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("scale", ["absolute", "gradnorm", "adaptive"])
def test_a_gradient_of_nan_stays_in_its_layer(pair, scale):
    def backward_to_nan(model):
        backward(model)
        next(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n).grad[0, 0] = torch.nan

    model, sound = steered(pair, scale), steered(pair, scale)
    train(model, sgd(model), 1, backward_to_nan)
    train(sound, sgd(sound), 1)
    got, expected = state(model), state(sound)
    for name in got:
        if "layers.0.self_attn.q_proj.lora_A" not in name:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=0)


def test_without_any_gradient_nothing_happens(pair):
    model = steered(pair)
    start = state(model)
    sgd(model).step()
    assert all(torch.equal(start[n], p) for n, p in state(model).items())
    assert telemetry(model)["guided_steps"] == 0


# One bias per step, on the whole gradient


@each_scale
def test_accumulation_equals_one_batch(pair, scale, target):
    def in_four(model):
        for ids in BATCH.chunk(4):
            backward(model, ids, 1 / 4)

    model = steered(pair, scale, target)
    other, start = copy.deepcopy(model), state(model)
    train(model, sgd(model), 3)
    train(other, sgd(other), 3, in_four)
    assert_same_update(other, model, start, 1e-5)
    assert telemetry(model)["guided_steps"] == telemetry(other)["guided_steps"] == 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])
def test_gradient_checkpointing(pair, scale, target, reentrant):
    model = steered(pair, scale, target)
    other, start = copy.deepcopy(model), state(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.enable_input_require_grads()
    forwards = []
    next(m for m in other.modules() if isinstance(m, LoraLayer)).register_forward_hook(lambda *_: forwards.append(1))
    train(model, sgd(model), 3)
    train(other, sgd(other), 3)
    assert len(forwards) == 6  # each forward pass ran again in the backward pass
    assert_same_update(other, model, start, 1e-5)


def rank_training(model, wrapped, rank, accumulation):
    """Three SGD steps on this rank's half of the batch, in `accumulation` micro-batches."""
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        *first, last = BATCH.chunk(2)[rank].chunk(accumulation)
        with wrapped.no_sync():
            for ids in first:
                backward(wrapped, ids, 1 / accumulation)
        backward(wrapped, last, 1 / accumulation)
        optimizer.step()
    return state(model)


DDP_MODES = [("absolute", "residual"), ("adaptive", "residual"), ("gradnorm", "factors"), ("decoupled", "factors")]


def ddp_worker(rank, folder):
    pair = Pair(folder, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), {})
    results = {}
    for scale, target in DDP_MODES:
        for accumulation in (1, 2):
            model = steered(pair, scale, target)
            wrapped = DistributedDataParallel(model)
            results[scale, target, accumulation] = rank_training(model, wrapped, rank, accumulation)
    return results


def test_two_processes_equal_one(pair):
    """DDP over gloo, with and without accumulation under no_sync, against one process with the whole batch."""
    ranks = on_two(ddp_worker, pair.folder)
    for scale, target in DDP_MODES:
        model = steered(pair, scale, target)
        start = state(model)
        train(model, sgd(model), 3)
        for accumulation in (1, 2):
            one, other = (r[scale, target, accumulation] for r in ranks)
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert_same_update(one, model, start, 1e-5)


def whole_model(pair):
    """Trained itself, a norm among the matrices."""
    model = twin_of(pair, steered(pair)).unload().float().requires_grad_(True)
    return guide(model, pair.prior, drift_scale="adaptive", drift_target="delta", drift_alpha=0.8)


LARGE = {
    "factors": lambda pair: steered(pair, "adaptive", "residual", dtype=torch.float32),
    "weight": lambda pair: steered(pair, "gradnorm", "delta", dtype=torch.float32, drift_norm="weight"),
    "tensors": whole_model,
}


@pytest.mark.parametrize("what", LARGE)
def test_gradients_of_any_size_are_guided_alike(pair, what):
    """What a step does to them is homogeneous, also where their squares are beyond fp32."""
    found = []
    for size in (1.0, 2.0**66, 2.0**-80):  # 1e20 and 1e-24, exactly
        model = LARGE[what](pair)
        (size * model(input_ids=BATCH, labels=BATCH).loss).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        found.append({name: p.grad / size for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-3, atol=1e-5 * float(g.abs().max()), msg=name)


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_parameters_of_deepspeed_are_refused(pair, mark, monkeypatch):
    engine = SimpleNamespace(DeepSpeedEngine=type("DeepSpeedEngine", (), {}))  # of a version without _take_model_step
    monkeypatch.setitem(sys.modules, ENGINE, engine)
    model = steered(pair)
    setattr(next(p for p in model.parameters() if p.requires_grad), mark, 0)  # as ZeRO 3 and ZeRO 1 and 2 do
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO trains copies .*use 0\.19, or train with DDP"):
        train(model, sgd(model))
