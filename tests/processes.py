"""Processes of the tests, which start at once: one server has imported what they need, for all tests of a process."""

import torch
from forks import fork_context

MODELS = "auto.modeling_auto", "llama.modeling_llama", "qwen2_5_vl.modeling_qwen2_5_vl"
CONTEXT = fork_context(
    *("drift_peft.tuner", "drift_peft.merge", "torch.distributed.fsdp", "PIL.Image"),
    *(f"transformers.models.{model}" for model in MODELS),
)


def on_two(worker, *args) -> None:
    """worker(rank, *args) on ranks 0 and 1; an exception in one of them is raised here."""
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method=CONTEXT.get_start_method())
