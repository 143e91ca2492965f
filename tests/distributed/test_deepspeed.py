"""DeepSpeed on three real processes over gloo: the same update as one process with the whole batch.

Three, so that no parameter divides evenly: ZeRO 3 pads the last part, and ZeRO 1 and 2 cut parameters in the middle.
"""

import copy
import logging
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from pairs import Pair
from transformers import LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from twin import BATCH as EIGHT_ROWS
from twin import MODES, assert_same_update, backward, randomized, sgd, state, steered, trainable

from drift_peft import DriftConfig, guide, telemetry

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-distributed installs it")
from deepspeed.accelerator import get_accelerator

FP16_HERE = get_accelerator().is_fp16_supported()
needs_fp16 = pytest.mark.skipif(not FP16_HERE, reason="DeepSpeed has no fp16 on this processor")

PROCESSES = 3
BATCH = EIGHT_ROWS[: 2 * PROCESSES]
STAGES = (1, 2, 3)
# With these and the learning rate below, updates are far above the rounding of fp32 (SGD's gradients are small here).
STRENGTH = {"absolute": 0.01, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 0.02}


def partitioned(folder):
    """As transformers loads a model for ZeRO 3: no process ever has all of it. Whole in a process without DeepSpeed."""
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    if not torch.distributed.is_initialized():
        unset_hf_deepspeed_config()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del kept
    return model


@dataclass
class Case:
    """One way to train; the reference has one process, one micro-batch and plain torch."""

    scale: str = "adaptive"
    target: str = "residual"
    stage: int = 2
    settings: dict = field(default_factory=dict)  # of DriftConfig
    made_by: str = "adapter"  # or "second adapter", "full", "full partitioned"
    optimizer: str = "sgd"  # or "adamw", "two groups"
    lr: float = 3.0
    accumulation: int = 1
    by_hand: bool = False  # accumulated by the loop, not by the engine
    clip: float = 0.0
    zero: dict = field(default_factory=dict)  # further settings of zero_optimization
    config: dict = field(default_factory=dict)  # and of the whole configuration
    tolerance: float = 2e-5  # of fp32 over three processes: one processor rounds by 1.3e-5, another by less than 1e-5

    def model(self, pair):
        if self.made_by.startswith("full"):
            model = copy.deepcopy(pair.base) if self.made_by == "full" else partitioned(pair.folder / "base")
            model.train().requires_grad_(False)
            for name, p in model.named_parameters():
                p.requires_grad = any(part in name for part in ("q_proj.weight", "down_proj.weight"))
            scale = {"drift_scale": self.scale, "drift_target": self.target, "drift_alpha": STRENGTH[self.scale]}
            return guide(model, pair.prior, **scale)
        settings = {"dtype": torch.float32, "drift_alpha": STRENGTH[self.scale], **self.settings}
        model = steered(pair, self.scale, self.target, **settings)
        if self.made_by == "second adapter":
            model.add_adapter("second", DriftConfig(prior=pair.path, r=3, target_modules=["q_proj", "gate_proj"]))
            model.base_model.set_adapter(["default", "second"])
            model = randomized(model, dtype=torch.float32)
        return model

    def torch_optimizer(self, model):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(trainable(model), lr=0.02)
        if self.optimizer == "two groups":
            rates = {"lora_A": self.lr, "lora_B": 2 * self.lr}
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups = [{"params": [p for n, p in named if key in n], "lr": lr} for key, lr in rates.items()]
            return torch.optim.SGD(groups, lr=1.0)
        return sgd(model, lr=self.lr)

    def engine(self, model):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 2 // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,  # on by default
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, **self.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **({"managed_gradient_accumulation": False} if self.by_hand else {}),
            **self.config,
        }
        optimizer = self.torch_optimizer(model)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def train_engine(self, engine, rank, steps=3):
        for _ in range(steps):
            parts = BATCH.chunk(PROCESSES)[rank].chunk(self.accumulation)
            for ids in parts:
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                if not self.by_hand or ids is parts[-1]:
                    engine.step()

    def clip_gradients(self, optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert torch.nn.utils.clip_grad_norm_(parameters, self.clip) > self.clip

    def train(self, model, steps=3):
        optimizer = self.torch_optimizer(model)
        if self.clip:  # after guidance, whose hook comes first
            optimizer.register_step_pre_hook(self.clip_gradients)
        for _ in range(steps):
            optimizer.zero_grad()
            backward(model, BATCH)
            optimizer.step()


CASES = {
    # toward delta it goes far, and what rounding leaves grows on the way
    f"{scale} {target}, {stage}": Case(
        scale, target, stage, lr=1.0 if (scale, target) == ("gradnorm", "delta") else 3.0
    )
    for scale, target in MODES
    for stage in (2, 3)
}
BOTH = [("adaptive", "residual"), ("decoupled", "factors")]
CASES |= {
    f"{name}, {scale}, {stage}": Case(**{"scale": scale, "target": target, "stage": stage, **options})
    for scale, target in BOTH
    for stage in STAGES
    for name, options in {
        "SGD": {},
        "AdamW": {"optimizer": "adamw", "tolerance": 1e-4},
        "accumulation": {"accumulation": 2},
        "two groups": {"optimizer": "two groups"},
        "five rows": {"settings": {"r": 5}},
        "clipping": {"clip": 0.02, "lr": 30.0},
    }.items()
}
CASES |= {
    f"{name}, {scale}": Case(**{"scale": scale, "target": target, **options})
    for scale, target in BOTH
    for name, options in {
        "no ZeRO": {"stage": 0},
        "accumulation by hand, 1": {"stage": 1, "accumulation": 2, "by_hand": True},
        "accumulation by hand, 2": {"stage": 2, "accumulation": 2, "by_hand": True},
        "accumulation by hand, 3": {"stage": 3, "accumulation": 2, "by_hand": True},
        "optimizer on the CPU, 2": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
        "optimizer on the CPU, 3": {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}},
        "parameters on the CPU": {"stage": 3, "zero": {"offload_param": {"device": "cpu"}}},
        "persistent parameters": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 100_000}},
        "small groups": {"stage": 3, "zero": {"sub_group_size": 1000, "reduce_bucket_size": 500}},
        "small buckets": {"zero": {"reduce_bucket_size": 500, "overlap_comm": True}},
        "fully trained, 2": {"made_by": "full", "target": "residual" if scale == "adaptive" else "base"},
        "fully trained, 3": {"made_by": "full", "target": "residual" if scale == "adaptive" else "base", "stage": 3},
        "partitioned while loading": {
            "made_by": "full partitioned",
            "target": "residual" if scale == "adaptive" else "base",
            "stage": 3,
        },
        "second adapter, 2": {"made_by": "second adapter"},
        "second adapter, 3": {"made_by": "second adapter", "stage": 3},
    }.items()
}
BF16 = {"config": {"bf16": {"enabled": True}}, "tolerance": 0.2}  # rounding to 8 bits
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES |= {
    f"{name}, {scale}": Case(**{"scale": scale, "target": target, **BF16, **options})
    for scale, target in BOTH
    for name, options in {
        "bf16, 1": {"stage": 1, "accumulation": 2},
        "bf16, 2": {"stage": 2},
        "bf16, 3": {"stage": 3},
        "bf16 summed in fp32, 1": {"stage": 1, "accumulation": 2, "config": BF16["config"] | FP32_SUMS},
        "bf16 summed in fp32, 2": {"stage": 2, "accumulation": 2, "config": BF16["config"] | FP32_SUMS},
    }.items()
}
CASES["bf16 without ZeRO"] = Case(stage=0, **BF16)
FP16 = {"config": {"fp16": {"enabled": True, "initial_scale_power": 10}}, "tolerance": 0.05}
CASES |= {
    f"fp16, {scale}, {stage}": Case(**{"scale": scale, "target": target, "stage": stage, **FP16})
    for scale, target in [("absolute", "residual"), *BOTH]
    for stage in STAGES
}


def whole(model):
    """What the forward pass uses; and the fp32 weights that are trained."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    used, kept = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            master = safe_get_full_fp32_param(p)
            with zero.GatheredParameters([p]):
                used[name] = p.detach().double().clone()
            kept[name] = used[name] if master is None else master.double().clone()
    return used, kept


def worker(rank, folder, port, names):
    import deepspeed

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    deepspeed.init_distributed("gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=PROCESSES)
    pair = Pair(folder, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), {})
    results = {}
    for name in names:
        case = CASES[name]
        model = case.model(pair)
        engine = case.engine(model)
        case.train_engine(engine, rank)
        results[name] = *whole(model), telemetry(model)
        engine.destroy()
    for stage, skipped in ((2, True), (3, True), (2, False)) if FP16_HERE else ():
        results["overflow", stage, skipped] = overflow(pair, rank, stage, skipped)
    results |= {refused: refusal(pair, rank, refused) for refused in REFUSED}
    torch.save(results, folder / f"deepspeed{rank}.pt")
    torch.distributed.destroy_process_group()


def overflow(pair, rank, stage, skipped):
    """(moved, guided steps) of one fp16 step whose loss scale is far too high, or is not."""
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 30 if skipped else 8, "hysteresis": 1}}
    case = Case("decoupled", "factors", stage, config=fp16)
    model = case.model(pair)
    engine = case.engine(model)
    before = whole(model)[1]
    case.train_engine(engine, rank, steps=1)
    after = whole(model)[1]
    told = telemetry(model)["guided_steps"]
    engine.destroy()
    return any(not torch.equal(before[name], after[name]) for name in before), told


REFUSED = {
    "norm of the weight": (Case(settings={"drift_norm": "weight"}), "not available under FSDP and DeepSpeed"),
    "round robin": (Case(zero={"round_robin_gradients": True}), "round_robin_gradients .* set it to false"),
    "decoupled without ZeRO": (
        Case("decoupled", "factors", 0, config={"bf16": {"enabled": True}}),
        "does not reach the fp32 weights .* set zero_optimization.stage to 1, 2 or 3",
    ),
}


def refusal(pair, rank, name):
    case, _ = REFUSED[name]
    engine = case.engine(case.model(pair))
    try:
        case.train_engine(engine, rank, steps=1)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()


@pytest.fixture(scope="module")
def trained(pair, request):
    """What all processes have found, in the cases that are to be tested."""
    tests = [item for item in request.session.items if item.originalname == "test_three_processes_equal_one"]
    names = [item.callspec.params["name"] for item in tests]
    names = [name for name in names if FP16_HERE or "fp16" not in CASES[name].config]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (pair.folder, port, names), nprocs=PROCESSES)
    return [torch.load(pair.folder / f"deepspeed{rank}.pt") for rank in range(PROCESSES)]


def joined(tensors):
    return {"all of them": torch.cat([tensor.flatten() for tensor in tensors.values()])}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fp16) if "fp16" in case.config else name for name, case in CASES.items()]
)
def test_three_processes_equal_one(pair, trained, name):
    case = CASES[name]
    model = case.model(pair)
    start = state(model)
    case.train(model)
    expected, told_here = state(model), telemetry(model)
    for used, kept, told in (results[name] for results in trained):
        assert kept.keys() == used.keys() == expected.keys()
        for key in used:  # the next forward pass takes what was trained, as far as 16 bit can tell
            assert (used[key] - kept[key]).norm() <= (4e-3 if case.config else 1e-7) * kept[key].norm()
        assert told["guided_steps"] == 3
        if not case.config:
            assert_same_update(kept, expected, start, case.tolerance)
            assert told == pytest.approx(told_here, rel=1e-3, abs=1e-4)
        else:  # forward and backward pass are rounded to 16 bit; plain LoRA would still have gone elsewhere
            assert_same_update(joined(kept), joined(expected), joined(start), case.tolerance)
            plain = replace(case, settings={**case.settings, "drift_alpha": 0.0})
            plain.train(model := plain.model(pair))
            with pytest.raises(AssertionError):
                assert_same_update(joined(state(model)), joined(expected), joined(start), case.tolerance)


@needs_fp16
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_skipped_on_overflow_applies_nothing(trained, stage):
    for results in trained:
        assert results["overflow", stage, True] == (False, 0)
        assert results["overflow", 2, False] == (True, 1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reached_is_refused(trained, name):
    for results in trained:
        assert re.search(REFUSED[name][1], results[name])


def test_installed_whichever_is_imported_first(tmp_path):
    """DeepSpeed before or after this library: the engine is wrapped once."""
    first, second = "import deepspeed", "from drift_peft import DriftConfig"
    check = "from deepspeed.runtime.engine import DeepSpeedEngine as E\n"
    check += "step = E._take_model_step\nassert not hasattr(step.__wrapped__, '__wrapped__')"
    for lines in ((first, second), (second, first)):
        subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], check=True, cwd=tmp_path)
