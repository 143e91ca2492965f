"""The hooks with real optimizers on a real PEFT model: every step is the oracle's, whatever the training loop."""

import copy
import gc
import importlib
import io
import re
import warnings
import weakref

import bitsandbytes
import pytest
import torch
from conftest import Pair
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from reference import Layer, norm
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import drift_peft.step
from drift_peft import DriftConfig, guide, telemetry
from drift_peft.step import Stack

ALPHA = {"absolute": 0.3, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 4.0}
MODES = [(scale, target) for scale in list(ALPHA)[:3] for target in ("residual", "delta", "factors")]
MODES += [("decoupled", "factors")]
three_modes = pytest.mark.parametrize(
    ("scale", "target"), [("absolute", "factors"), ("gradnorm", "residual"), ("decoupled", "factors")]
)
every_mode = pytest.mark.parametrize(("scale", "target"), MODES)
BATCH = torch.randint(7, 64, (8, 10), generator=torch.Generator().manual_seed(0))


# A steered model, and its twin: plain LoRA with the same weights, whose gradients the oracle biases


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


# Modes and optimizers


@every_mode
def test_every_mode_steps_as_the_oracle(pair, scale, target):
    assert_guided_like_oracle(pair, sgd, scale, target)


@pytest.mark.parametrize("drift_rank", [1, 3, 8])
def test_drift_rank(pair, drift_rank):
    assert_guided_like_oracle(pair, sgd, "gradnorm", "residual", drift_rank=drift_rank)
    assert_guided_like_oracle(pair, sgd, "absolute", "delta", drift_rank=drift_rank)


@pytest.mark.parametrize("elements", [1, 600])
def test_layers_in_more_than_one_batch(pair, monkeypatch, elements):
    monkeypatch.setattr(drift_peft.step, "BATCH_ELEMENTS", elements)
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


def learning_rates(model):
    """LoRA+: a higher learning rate for B."""
    groups = {key: [p for n, p in model.named_parameters() if key in n] for key in ("lora_A", "lora_B")}
    return torch.optim.SGD([{"params": groups["lora_A"]}, {"params": groups["lora_B"], "lr": 0.08}], lr=0.02)


OPTIMIZERS = {
    "momentum": lambda m: torch.optim.SGD(trainable(m), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(trainable(m), lr=0.02),
    "foreach": lambda m: torch.optim.AdamW(trainable(m), lr=0.02, foreach=True),
    "fused": lambda m: torch.optim.AdamW(trainable(m), lr=0.02, fused=True),
    "lr tensor": lambda m: torch.optim.AdamW(trainable(m), lr=torch.tensor(0.02)),
    "lr groups": learning_rates,
    "adafactor": lambda m: torch.optim.Adafactor(trainable(m), lr=0.02),
    "8 bit": lambda m: bitsandbytes.optim.AdamW8bit(trainable(m), lr=0.02, min_8bit_size=1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])
def test_optimizers(pair, scale, target, optimizer):
    options = {"dtype": torch.float32, "tolerance": 2e-2} if optimizer == "8 bit" else {}
    assert_guided_like_oracle(pair, OPTIMIZERS[optimizer], scale, target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_mode
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


@every_mode
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


@every_mode
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
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    pair = Pair(folder, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), {})
    results = {}
    for scale, target in DDP_MODES:
        for accumulation in (1, 2):
            model = steered(pair, scale, target)
            wrapped = DistributedDataParallel(model)
            results[scale, target, accumulation] = rank_training(model, wrapped, rank, accumulation)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(pair):
    """DDP over gloo, with and without accumulation under no_sync, against one process with the whole batch."""
    torch.multiprocessing.spawn(ddp_worker, (pair.folder,), nprocs=2)
    ranks = [torch.load(pair.folder / f"rank{rank}.pt") for rank in (0, 1)]
    for scale, target in DDP_MODES:
        model = steered(pair, scale, target)
        start = state(model)
        train(model, sgd(model), 3)
        for accumulation in (1, 2):
            one, other = (r[scale, target, accumulation] for r in ranks)
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert_same_update(one, model, start, 1e-5)


def test_sharded_parameters_are_refused(pair):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = steered(pair, dtype=torch.float32)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"adapter of layers\.0.* is sharded: .*FSDP.*train on one GPU or with"):
            train(model, sgd(model))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_parameters_of_deepspeed_are_refused(pair, mark):
    model = steered(pair)
    setattr(next(p for p in model.parameters() if p.requires_grad), mark, 0)  # as ZeRO 3 and ZeRO 1 and 2 do
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO trains copies .*train on one GPU or with DDP"):
        train(model, sgd(model))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_is_refused(pair, mark):
    """What DeepSpeed's ZeRO 3, and 1 and 2, leave on the parameters whose copies they train."""
    model = steered(pair)
    for parameter in trainable(model):
        setattr(parameter, mark, 0)
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO trains copies of the parameters"):
        train(model, sgd(model))


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
    model = steered(pair, scale, target)
    twin, start = twin_of(pair, model), state(model)

    def halves(m):
        named = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
        return [torch.optim.SGD([p for n, p in named if (split in n) == one], lr=0.05) for one in (True, False)]

    both = halves(model)
    for _ in range(2):
        backward(model)
        for optimizer in both:
            optimizer.step()
        model.zero_grad()
    both = halves(twin)
    for _ in range(2):
        backward(twin)
        for optimizer in both:
            bias_by_oracle(twin, pair.prior, scale, target, only=optimizer.param_groups[0]["params"])
            optimizer.step()
            pull_by_oracle(twin, pair.prior, scale, optimizer)
        twin.zero_grad()
    assert_same_update(model, twin, start)


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
@every_mode
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


# The life of a model


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("after", [0, 1])
def test_copies_stay_steered_and_so_do_their_originals(pair, how, after):
    model = steered(pair)
    train(model, sgd(model), after)
    twin, start = twin_of(pair, model), state(model)
    clone = how(model)
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    for m in (clone, model):
        train(m, sgd(m))
        assert_same_update(m, twin, start)
        assert telemetry(m)["guided_steps"] == 2 + after
    del model
    gc.collect()
    start = state(clone)
    train(clone, sgd(clone))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    assert_same_update(clone, twin, start)


def test_a_deleted_model_is_freed(pair):
    gc.collect()
    before = len(drift_peft.step._STEERED)
    model = steered(pair)
    train(model, sgd(model))
    assert len(drift_peft.step._STEERED) == before + 14
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    refs = [weakref.ref(x) for x in (model, layer, layer.lora_A["default"].weight, layer.drift["default"])]
    del model, layer
    gc.collect()
    assert [r() for r in refs] == [None] * 4
    assert len(drift_peft.step._STEERED) == before


def test_reloading_the_module_does_not_guide_twice(pair):
    model = steered(pair)
    twin, start = twin_of(pair, model), state(model)
    for _ in range(2):
        importlib.reload(drift_peft.step)
    train(model, sgd(model))
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
    assert_same_update(model, twin, start)
    assert_guided_like_oracle(pair, sgd)  # and so is a model that is wrapped now


def test_after_a_change_of_dtype(pair):
    model = steered(pair, dtype=torch.float32)
    twin = twin_of(pair, model)
    for dtype in (torch.float32, torch.float64, torch.float32):
        start = state(model.to(dtype))
        train(model, sgd(model))
        train_by_oracle(twin.to(dtype), sgd(twin), pair.prior, "adaptive", "residual")
        assert_same_update(model, twin, start, 1e-4)


def test_the_stack_of_the_prior_is_kept_until_the_device_changes(pair):
    steered_here = [m.drift["default"] for m in steered(pair).modules() if isinstance(m, LoraLayer)][:1]
    stack = Stack.of(steered_here, torch.device("cpu"))
    assert Stack.of(steered_here, torch.device("cpu")) is stack
    assert Stack.of(steered_here, torch.device("meta")).U.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices, CPU and GPU")
def test_after_a_change_of_device(pair):
    model = steered(pair)
    twin = twin_of(pair, model)
    for device in ("cpu", "cuda", "cpu"):
        start = state(model)
        model.to(device)
        train(model, sgd(model), backward=lambda m, device=device: backward(m, BATCH.to(device)))
        model.to("cpu")
        train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
        assert_same_update(model, twin, start, 1e-4)


def test_unloading_leaves_the_base_to_itself(pair):
    model = steered(pair)
    base = model.unload()
    base.requires_grad_(True)
    plain = copy.deepcopy(pair.base).double()
    for m in (base, plain):
        train(m.train(), torch.optim.SGD(m.parameters(), lr=0.05), 1)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), plain.parameters(), strict=True))


def test_scaling_is_read_at_the_step(pair):
    model = steered(pair, "gradnorm")
    twin = twin_of(pair, model)
    for factor in (1, 3, 0.5):
        for m in (model, twin):
            for module in m.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale("default", factor)
        start = state(model)
        train(model, sgd(model))
        train_by_oracle(twin, sgd(twin), pair.prior, "gradnorm", "residual")
        assert_same_update(model, twin, start)


# Several adapters


def with_second(model, config):
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    model = randomized(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    return model


@pytest.mark.parametrize("both_steered", [False, True])
@pytest.mark.parametrize("scale", ["absolute", "gradnorm", "adaptive"])
def test_the_residual_subtracts_all_active_adapters(pair, scale, both_steered):
    second = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "gate_proj"]}
    mode = {"drift_scale": scale, "drift_alpha": ALPHA[scale]}
    model = steered(pair, scale)
    twin = with_second(twin_of(pair, model), LoraConfig(**second))
    if both_steered:
        with_second(model, DriftConfig(prior=pair.path, **mode, **second))
    else:
        model = guide(copy.deepcopy(twin), pair.prior, "default", **mode)
    start = state(model)
    train(model, sgd(model), 1)
    backward(twin)
    for adapter in ("default", "second")[: 1 + both_steered]:
        bias_by_oracle(twin, pair.prior, scale, "residual", adapter=adapter)
    sgd(twin).step()
    assert len(start) == 28 + 8
    assert_same_update(model, twin, start)


def test_a_deleted_adapter_is_not_steered(pair):
    model, other = steered(pair), steered(pair)
    with_second(model, DriftConfig(prior=pair.path, r=2))
    model.delete_adapter("default")
    model.set_adapter("second")
    twin, start = twin_of(pair, other), state(other)
    train(model, sgd(model), 1)
    train(other, sgd(other), 1)  # any model of the process
    train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual", 1)
    assert_same_update(other, twin, start)
    assert telemetry(model)["guided_steps"] == 1


# What is told


@pytest.mark.parametrize("how", ["config", "guide", "prior"])
def test_telemetry_against_dense_numbers(pair, how):
    model = steered(pair, drift_rank=None if how == "prior" else 3)
    if how != "config":
        model = twin_of(pair, model)
    if how == "guide":
        guide(model, pair.prior, drift_rank=3, drift_alpha=0.5)
    train(model, sgd(model))
    found = telemetry(model, pair.prior if how == "prior" else None)
    assert found.pop("guided_steps") == (0 if how == "prior" else 2)
    dense = list(oracle_layers(model, pair.prior, rank=None if how == "prior" else 3))
    expected = {}
    for kind, part in (("", dense), ("/attn", dense[:4] + dense[7:11]), ("/mlp", dense[4:7] + dense[11:])):
        update = torch.cat([layer.adapters.flatten() for _, layer in part])
        delta = torch.cat([layer.delta.flatten() for _, layer in part])
        expected[f"alignment{kind}"] = float(update @ delta / (update.norm() * delta.norm()))
        expected[f"absorbed{kind}"] = float(update @ delta / delta.norm() ** 2)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_telemetry_of_a_start_and_of_a_plain_model(pair):
    model = get_peft_model(copy.deepcopy(pair.base), DriftConfig(prior=pair.path, r=4))
    assert set(telemetry(model).values()) == {0}
    with pytest.raises(ValueError, match=r"No layer of this model is steered.*guide\(model, prior\)"):
        telemetry(twin_of(pair, model))


def step_by_hand(model):
    backward(model)
    with torch.no_grad():
        for p in trainable(model):
            p -= 0.05 * p.grad


def step_guided(model):
    train(model, sgd(model))


@pytest.mark.parametrize(
    ("trained", "drift_alpha", "warns"),
    [(step_by_hand, 1.0, True), (step_by_hand, 0.0, False), (step_guided, 1.0, False), (id, 1.0, False)],
)
def test_saving_says_when_the_guidance_never_ran(pair, tmp_path, trained, drift_alpha, warns):
    config = DriftConfig(prior=pair.path, r=4, drift_alpha=drift_alpha)
    model = get_peft_model(copy.deepcopy(pair.base), config).train()
    trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    assert ["the guidance never ran" in str(w.message) for w in caught] == [True] * warns
