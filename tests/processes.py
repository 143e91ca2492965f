"""Processes that start at once: each forks from a server that has imported what takes seconds, one for all tests of a
pytest process. They are the only ones that do not depend on what the test process has done before."""

import multiprocessing

import torch

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    models = ("auto.modeling_auto", "llama.modeling_llama", "qwen2_5_vl.modeling_qwen2_5_vl")
    CONTEXT.set_forkserver_preload(
        ["drift_peft.tuner", "drift_peft.merge", "torch.distributed.fsdp", "PIL.Image"]
        + [f"transformers.models.{model}" for model in models]
    )


def on_two(worker, *args) -> None:
    """worker(rank, *args) on ranks 0 and 1; an exception in one of them is raised here."""
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method=CONTEXT.get_start_method())
