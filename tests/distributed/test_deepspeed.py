"""DeepSpeed on three real processes over gloo: the same update as one process with the whole batch.

Three, so that no parameter divides evenly: ZeRO 3 pads the last part, and ZeRO 1 and 2 cut parameters in the middle.
"""

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from conftest import Pair
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM
from twin import MODES, assert_same_update, backward, randomized, sgd, state, steered, trainable
from twin import BATCH as EIGHT_ROWS

import drift_peft.step
from drift_peft import DriftConfig, guide, telemetry

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-distributed installs it")

PROCESSES = 3
BATCH = EIGHT_ROWS[: 2 * PROCESSES]
STAGES = (1, 2, 3)
# With these and the learning rate below, updates are far above the rounding of fp32 (SGD's gradients are small here).
STRENGTH = {"absolute": 0.01, "gradnorm": 0.8, "adaptive": 0.8, "decoupled": 0.02}


@dataclass
class Case:
    """One way to train; the reference has one process, one micro-batch and plain torch."""

    scale: str = "adaptive"
    target: str = "residual"
    stage: int = 2
    settings: dict = field(default_factory=dict)  # of DriftConfig
    made_by: str = "adapter"  # or "second adapter", "full"
    optimizer: str = "sgd"  # or "adamw", "two groups"
    lr: float = 10.0
    accumulation: int = 1
    by_hand: bool = False  # accumulated by the loop, not by the engine
    clip: float = 0.0
    zero: dict = field(default_factory=dict)  # further settings of zero_optimization
    config: dict = field(default_factory=dict)  # and of the whole configuration
    tolerance: float = 1e-5

    def model(self, pair):
        if self.made_by == "full":
            model = copy.deepcopy(pair.base).train().requires_grad_(False)
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

    def train(self, model, steps=3):
        optimizer = self.torch_optimizer(model)
        if self.clip:  # after guidance, whose hook comes first
            optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(trainable(model), self.clip))
        for _ in range(steps):
            optimizer.zero_grad()
            backward(model, BATCH)
            optimizer.step()


CASES = {f"{scale} {target}, {stage}": Case(scale, target, stage) for scale, target in MODES for stage in (2, 3)}
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
        "clipping": {"clip": 0.02},
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
        "small buckets": {"zero": {"reduce_bucket_size": 500, "round_robin_gradients": True, "overlap_comm": True}},
        "fully trained, 2": {"made_by": "full", "target": "residual" if scale == "adaptive" else "base"},
        "fully trained, 3": {"made_by": "full", "target": "residual" if scale == "adaptive" else "base", "stage": 3},
        "second adapter, 2": {"made_by": "second adapter"},
        "second adapter, 3": {"made_by": "second adapter", "stage": 3},
    }.items()
}
BF16 = {"config": {"bf16": {"enabled": True}}, "tolerance": 0.05}
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
