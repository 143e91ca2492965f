"""What model_init_kwargs changes of the memory: all that may is read, or refused."""

from __future__ import annotations

import torch

from .dry_run import MEASURE

READ = "dtype", "attn_implementation"
# What changes nothing of the memory.
OTHERS = "trust_remote_code", "cache_dir", "token", "local_files_only", "use_safetensors", "low_cpu_mem_usage"


def check_loading(kwargs: dict | None, computes: torch.dtype) -> None:
    """ValueError for what may change the memory, and is not counted.

    Args:
        computes: in what training computes, by bf16 and fp16.
    """
    own = str(computes).removeprefix("torch.")
    for key, value in (kwargs or {}).items():
        if key == "dtype" and value != own:
            raise ValueError(
                f"model_init_kwargs has dtype {value}, while training computes in {own} by bf16 and fp16, and what the "
                "two take together is not counted: leave dtype out, or set bf16 and fp16 for it"
            )
        if key not in READ + OTHERS:
            raise ValueError(f"what {key} in model_init_kwargs takes is not counted: leave it out, or {MEASURE}")


def is_eager(kwargs: dict | None) -> bool:
    """Are the scores of attention computed as tensors? All other implementations take about the same."""
    named = (kwargs or {}).get("attn_implementation")
    return "eager" in (named.values() if isinstance(named, dict) else [named])  # or one for each part of the model
