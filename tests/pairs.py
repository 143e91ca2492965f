"""Tiny base and expert of several families with their prior on disk, and the steps that tests of the tuner take."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from drift_peft import DriftConfig, ReasoningPrior, build_prior
from drift_peft.checkpoints.naming import PROJECTIONS, canonical_name, module_kind

FAMILIES = ("qwen2_5_vl", "llava_next", "idefics2", "llama")
IDS = torch.arange(7, 27).reshape(2, 10)
TOWERS = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector")
SKIP = ["lm_head", *(f"model.{name}" for name in TOWERS)]


@dataclass
class Pair:
    """A tiny text Llama, what an expert has beyond it, and the prior made from both."""

    folder: Path  # holds base/, expert/, prior.safetensors and attn.safetensors (the attention's Δ alone)
    base: torch.nn.Module
    delta: dict[str, torch.Tensor]  # canonical weight name -> Δ [out, in]

    @property
    def path(self) -> Path:
        return self.folder / "prior.safetensors"

    @property
    def prior(self) -> ReasoningPrior:
        return ReasoningPrior.load(self.path)


def load(folder, family, kind="fp32"):
    """`kind`: fp32, bf16, nf4, which computes in fp32, or nf4 bf16."""
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    dtype, options = torch.bfloat16 if kind.endswith("bf16") else torch.float32, {}
    if kind.startswith("nf4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=SKIP,
        )
    return auto.from_pretrained(folder / "base", dtype=dtype, **options)


def nearly(model, share: float):
    """Every projection moved by this share of its norm, at random."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                noise = torch.randn_like(weight)
                weight += share * weight.norm() / noise.norm() * noise
    return model


def drift(folder, **settings):
    """At full strength unless it is named: a few steps shall show."""
    settings = {"drift_alpha": 1.0, **settings}
    return DriftConfig(prior=folder / "prior.safetensors", r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


def wrap(model, config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        return get_peft_model(model, config)


def train(model, steps=3, lr=1e-3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def untouched(model):
    return not any(isinstance(m, LoraLayer) for m in model.modules())


def make_pair(folder, family):
    """Write `base`, `expert` and `prior.safetensors` of rank 8 into the folder."""
    if family == "llama":
        base, expert = tiny_llm("llava"), tiny_llm("llava")
        generator = torch.Generator().manual_seed(1)
        for name, weight in expert.named_parameters():
            if module_kind(canonical_name(name) or "") in PROJECTIONS:
                weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    else:
        base = tiny_vlm(family)
        expert, _ = tiny_expert(family, base)
    save_layout(base, folder / "base")
    save_layout(expert, folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    return folder
