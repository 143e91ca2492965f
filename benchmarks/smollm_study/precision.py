"""In which numbers the study computes. Checkpoints are stored in bfloat16 either way."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import BitsAndBytesConfig

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["model.vision_model", "model.connector", "lm_head"],
)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; on a CPU without AVX-512 float32, since a product in bfloat16 takes 58 times as long there."""
    slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.float32 if slow else torch.bfloat16


def autocast(device: torch.device):
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def nf4(device: torch.device) -> BitsAndBytesConfig:
    config = deepcopy(NF4)
    config.bnb_4bit_compute_dtype = compute_dtype(device)
    return config
