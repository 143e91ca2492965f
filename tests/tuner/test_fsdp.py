"""FSDP2 (`fully_shard`) on two real processes over gloo: the same update as one process with the whole batch."""

import copy
import json
import re
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint
from pairs import Pair
from peft import PeftModel, get_peft_model
from processes import on_two
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaForCausalLM
from twin import (
    BATCH,
    MODES,
    assert_same_update,
    backward,
    make_whole_pair,
    randomized,
    sgd,
    state,
    steered,
    train,
    trainable,
)

from drift_peft import DriftConfig, guide, telemetry

# With these and the learning rate below, updates are far above the rounding of fp32 (SGD's gradients are small here).
STRENGTH = {"absolute": 0.01, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 0.02}
STEPS = 2


@dataclass
class Case:
    """One way to train; every field is the same in both runs but for `accumulation` and what is sharded how."""

    scale: str = "adaptive"
    target: str = "residual"
    settings: dict = field(default_factory=dict)  # of DriftConfig
    made_by: str = "adapter"  # or "second adapter", "drift start", "full"
    optimizer: str = "sgd"
    lr: float = 10.0
    dtype: torch.dtype = torch.float64
    clip: float | None = None
    accumulation: int = 1
    sync: bool = True  # False: micro-batches stay unsharded until the last one
    sharded: str = "layers"  # or "root", "columns", "some", "hybrid"
    sharded_first: bool = False  # before it is steered, or wrapped

    def model(self, pair, shard=lambda model: model):
        settings = {"dtype": self.dtype, "drift_alpha": STRENGTH[self.scale], **self.settings}
        if self.made_by == "full":
            model = copy.deepcopy(pair.base).to(self.dtype).train().requires_grad_(False)
            for name, p in model.named_parameters():
                p.requires_grad = any(part in name for part in ("q_proj.weight", "down_proj.weight", "input_layernorm"))
            scale = {"drift_scale": self.scale, "drift_target": self.target, "drift_alpha": STRENGTH[self.scale]}
            return guide(shard(model), pair.prior, **scale)
        if self.sharded_first:
            config = DriftConfig(prior=pair.path, r=6, **self.settings)
            return get_peft_model(shard(copy.deepcopy(pair.base).double()), config).train()
        if self.made_by == "drift start":
            config = DriftConfig(prior=pair.path, r=6, **self.settings)
            return get_peft_model(copy.deepcopy(pair.base), config).double().train()
        model = steered(pair, self.scale, self.target, **settings)
        if self.made_by == "second adapter":
            model.add_adapter("second", DriftConfig(prior=pair.path, r=3, target_modules=["q_proj", "gate_proj"]))
            model.base_model.set_adapter(["default", "second"])
            model = randomized(model)
        return model

    def shard(self, model):
        layers = [m for name, m in model.named_modules() if name.endswith(("layers.0", "layers.1"))]
        options = {}
        if self.sharded == "columns":  # of the first layer only: layers of one shape are sharded differently
            options = {0: {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None}}
        if self.sharded == "hybrid":
            mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
            options = {key: {"mesh": mesh} for key in (0, 1, "root")}
        for i, layer in enumerate(layers[: {"root": 0, "some": 1}.get(self.sharded)]):
            fully_shard(layer, **options.get(i, {}))
        if self.sharded == "some":  # the second layer is replicated, and its gradients are averaged by hand
            fully_shard(model, ignored_params=set(layers[1].parameters()))
        else:
            fully_shard(model, **options.get("root", {}))
        return model

    def train(self, model, rank=None, steps=STEPS):
        adamw = self.optimizer == "adamw"
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02) if adamw else sgd(model, lr=self.lr)
        parts = [BATCH] if rank is None else BATCH.chunk(2)[rank].chunk(self.accumulation)
        for _ in range(steps):
            optimizer.zero_grad()
            for ids in parts:
                if rank is not None and not self.sync:
                    model.set_requires_gradient_sync(ids is parts[-1])
                backward(model, ids, 1 / len(parts))
            if rank is not None:
                for p in trainable(model):
                    if not isinstance(p, DTensor):
                        torch.distributed.all_reduce(p.grad)
                        p.grad /= 2
            if self.clip:
                assert torch.nn.utils.clip_grad_norm_(trainable(model), self.clip) > self.clip
            optimizer.step()
        return optimizer


CASES = {f"{scale} {target}": Case(scale, target) for scale, target in MODES}
CASES |= {
    f"{name}, {scale}": Case(scale, target, **options)
    for scale, target in [("adaptive", "residual"), ("absolute", "factors"), ("decoupled", "factors")]
    for name, options in {
        "three rows on two processes": {"settings": {"r": 3}},
        "one row on two processes": {"settings": {"r": 1}, "lr": 0.5},
        "one unit per process": {"sharded": "root"},
        "columns of some layers": {"sharded": "columns"},
        "some layers not sharded": {"sharded": "some"},
        "hybrid": {"sharded": "hybrid"},
        "accumulation": {"accumulation": 2},
        "accumulation without synchronization": {"accumulation": 2, "sync": False},
        "AdamW": {"optimizer": "adamw"},
        "clipping and AdamW": {"optimizer": "adamw", "clip": 0.02, "accumulation": 2},
        "norms": {"settings": {"modules_to_save": ["input_layernorm"]}},
    }.items()
}
CASES |= {
    f"fp32 {optimizer}, {scale}": Case(scale, target, optimizer=optimizer, lr=20.0, dtype=torch.float32)
    for scale, target in [("adaptive", "residual"), ("absolute", "residual"), ("decoupled", "factors")]
    for optimizer in ("sgd", "adamw")
}
CASES |= {
    "decoupled base": Case("decoupled", "base"),
    "second adapter": Case(made_by="second adapter"),
    "drift start": Case(made_by="drift start"),
    "a part of Δ at the start": Case(made_by="drift start", settings={"drift_start": 0.5}),
    "full": Case(made_by="full"),
    "full, absolute delta": Case("absolute", "delta", made_by="full"),
    "full, decoupled": Case("decoupled", "base", made_by="full"),
    "sharded before it is wrapped": Case(sharded_first=True),
    "sharded before it is steered": Case(made_by="full", sharded_first=True),
}


# What is sharded and when is one thing, the scale another, the target and the optimizer are others again: all pairs of
# them only in `make test-slow`.
SLOW = {
    name for name in CASES if name.endswith((", absolute", ", decoupled")) and not name.startswith(("fp32", "full"))
}
SLOW |= {"a part of Δ at the start"}
SLOW |= {f"{scale} {target}" for scale, target in MODES} - {
    "adaptive residual",
    "absolute delta",
    "gradnorm factors",
    "decoupled factors",
}
SLOW |= {"fp32 adamw, adaptive", "fp32 sgd, absolute", "fp32 adamw, decoupled"}


def whole(model):
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone().double() for name, p in full.items()}


def worker(rank, folder, names):
    pair = Pair(folder, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), {})
    results = {}
    for name in names:
        case = CASES[name]
        model = case.model(pair, case.shard) if case.sharded_first else case.shard(case.model(pair))
        before = telemetry(model)
        case.train(model, rank)
        results[name] = whole(model), before, telemetry(model)
    results["collectives"] = count_collectives(pair)
    results["repeated"] = repeated_step(pair, rank)
    results["resumed"] = resume(pair, rank)
    results["saved"] = save(pair, rank)
    results["fsdp1"] = fsdp1(pair, rank)
    return results


def count_collectives(pair):
    """(collectives of one guided step, shapes among the adapters)."""
    model = Case().shard(Case().model(pair))
    backward(model)
    optimizer = sgd(model, lr=Case.lr)
    with CommDebugMode() as comm:
        optimizer.step()
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    return comm.get_total_counts(), len(shapes), sum("lora_" in name for name, _ in model.named_parameters())


def repeated_step(pair, rank):
    """Gradients zeroed in place are new ones; a second step on the same ones is not guided again."""
    model = Case().shard(Case().model(pair))
    optimizer = sgd(model, lr=Case.lr)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        backward(model, BATCH.chunk(2)[rank])
        optimizer.step()
    twice = whole(model)
    with pytest.warns(UserWarning, match="called twice on the same gradients"):
        optimizer.step()
    return twice, telemetry(model)


def resume(pair, rank):
    """The state of the optimizer, gathered and loaded into another one as distributed checkpoints do."""
    case = Case(optimizer="adamw", settings={"drift_warmup_steps": 6})
    model = case.shard(case.model(pair))
    optimizer = case.train(model, rank)
    options = checkpoint.StateDictOptions(full_state_dict=True)
    saved = checkpoint.get_state_dict(model, optimizer, options=options)
    again = case.shard(case.model(pair))
    optimizer = torch.optim.AdamW(trainable(again), lr=0.02)
    weights, moments = saved
    checkpoint.set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    for _ in range(2):
        optimizer.zero_grad()
        backward(again, BATCH.chunk(2)[rank])
        optimizer.step()
    return whole(again), telemetry(again)


def save(pair, rank):
    case = Case(dtype=torch.float32)
    model = case.shard(case.model(pair))
    case.train(model, rank)
    options = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = checkpoint.get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(pair.folder / "sharded", state_dict=full)
    torch.distributed.barrier()
    return whole(model)


def fsdp1(pair, rank):
    """What FSDP1's flattened parameters give."""
    model = Case().model(pair)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError) as error:
        train(wrapped, sgd(wrapped), 1, lambda m: backward(m, BATCH.chunk(2)[rank]))
    return str(error.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, pytestconfig):
    """A pair whose prior has norms too, and what both processes have found."""
    pair = make_whole_pair(tmp_path_factory.mktemp("fsdp"))
    pair.base.save_pretrained(pair.folder / "base")
    names = [name for name in CASES if name not in SLOW or pytestconfig.getoption("slow")]
    return pair, on_two(worker, pair.folder, names)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_two_processes_equal_one(sharded, name):
    pair, ranks = sharded
    case = CASES[name]
    model = case.model(pair)
    start = state(model)
    before = telemetry(model)
    case.train(model)
    after = telemetry(model)
    (one, one_before, one_after), (other, _, other_after) = (results[name] for results in ranks)
    assert all(torch.equal(one[n], other[n]) for n in one)
    tolerance = 1e-9 if case.dtype == torch.float64 else {"sgd": 1e-5, "adamw": 1e-4}[case.optimizer]
    assert_same_update(one, model, start, tolerance)
    assert one_before == pytest.approx(before, rel=1e-4, abs=1e-6)
    assert one_after == other_after == pytest.approx(after, rel=1e-4, abs=1e-6)
    assert after["guided_steps"] == STEPS


def test_collectives_per_shape_and_not_per_layer(sharded):
    _, ((count, shapes, factors), _) = sharded[0], [results["collectives"] for results in sharded[1]]
    assert (shapes, factors) == (5, 28)
    assert 0 < count <= 4 * 4  # A, B and their gradients, of four shapes of layers


def test_second_steps_on_the_same_gradients(sharded):
    pair, ranks = sharded
    model = Case().model(pair)
    start = state(model)
    train(model, sgd(model, lr=Case.lr), 2)
    for twice, told in (results["repeated"] for results in ranks):
        assert_same_update(twice, model, start, 1e-9)
        assert told["repeated_steps"] == 1


def test_resuming_from_a_gathered_state(sharded):
    pair, ranks = sharded
    case = Case(optimizer="adamw", settings={"drift_warmup_steps": 6})
    model = case.model(pair)
    start = state(model)
    case.train(model, steps=STEPS + 2)
    for resumed, told in (results["resumed"] for results in ranks):
        assert told["guided_steps"] == STEPS + 2
        assert_same_update(resumed, model, start, 1e-9)


def test_what_is_saved_is_whole(sharded):
    pair, ranks = sharded
    loaded = PeftModel.from_pretrained(copy.deepcopy(pair.base), pair.folder / "sharded")
    expected = ranks[0]["saved"]
    got = {name: p.detach().double() for name, p in loaded.named_parameters() if "lora_" in name}
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert json.loads((pair.folder / "sharded" / "drift_config.json").read_text())["drift_steps"] == STEPS


def test_fsdp1_is_refused(sharded):
    for results in sharded[1]:
        refusal = r"The adapter of layers\.\d.* is flattened: guidance under FSDP1 is not available; use fully_shard"
        assert re.match(refusal, results["fsdp1"])
