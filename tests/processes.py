"""Processes of the tests, which start at once: one server has imported what they need, for all tests of a process."""

import faulthandler
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from forks import fork_context
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.multiprocessing import ProcessExitedException

MODELS = "auto.modeling_auto", "llama.modeling_llama", "qwen2_5_vl.modeling_qwen2_5_vl"
CONTEXT = fork_context(  # not drift_peft.tuner, with which PEFT comes to know DRIFT
    *("drift_peft.prior", "drift_peft.keeping", "peft", "torch.distributed.fsdp", "PIL.Image"),
    *(f"transformers.models.{model}" for model in MODELS),
)


def start_server() -> None:
    """Before a benchmark starts one that has imported something else."""
    if CONTEXT.get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()


def on_two(worker, *args) -> list:
    """What worker(rank, *args) returns on ranks 0 and 1 of a group of both; an exception in one of them is raised here.

    With it comes what both have printed as errors: a signal that killed one says nothing of its cause. After such a
    death both start once more, and the first is told in a warning. In some hundred runs of FSDP a rank was twice killed
    by SIGABRT, once since glibc found its heap damaged. Why is not known: valgrind, AddressSanitizer and malloc's own
    checks find nothing in the same code.
    """
    try:
        return _on_two(worker, *args)
    except ProcessExitedException as death:
        if death.signal_name not in ("SIGABRT", "SIGSEGV"):
            raise
        warnings.warn("\n".join([f"{death}; both start once more.", *death.__notes__]), stacklevel=2)
        return _on_two(worker, *args)


def _on_two(worker, *args) -> list:
    start_method = CONTEXT.get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(_rank, (folder, worker, *args), nprocs=2, start_method=start_method)
        except Exception as error:
            for file in sorted(Path(folder).glob("stderr*")):
                error.add_note(f"{file.name}:\n{file.read_text(encoding='utf-8', errors='replace')}")
            raise
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in (0, 1)]


def _rank(rank: int, folder: str, worker, *args) -> None:
    with Path(folder, f"stderr of rank {rank}").open("wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(worker(rank, *args), Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # gloo's destructor waits for a thread that waits for the GIL: one process of some hundreds never ends


def replicated(module: torch.nn.Module, monkeypatch) -> list[torch.nn.Module]:
    """Two replicas, as DataParallel makes them for two devices; here both are on this one."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    return replicate.replicate(module, [0, 1])


class Program:
    """What `python -c code`, `python script.py` or `python -m module` would do, without the seconds of its imports.

    drift_peft is not among what it finds imported, and PEFT does not know it; nor is huggingface_hub, which reads its
    settings from the environment as it is imported.
    """

    def __init__(self, folder: Path, *command: object, cwd: Path | None = None, **environment: str):
        self.files = [Path(tempfile.mkdtemp(dir=folder), name) for name in ("stdout", "stderr")]
        arguments = [*map(str, command)], self.files, cwd or Path.cwd(), {**os.environ, **environment}
        self.process: BaseProcess = CONTEXT.Process(target=_execute, args=arguments)
        self.process.start()

    def ended(self) -> tuple[int | None, str, str]:
        """Exit code (-signal of one that killed it), stdout, stderr."""
        self.process.join()
        return self.process.exitcode, *(file.read_text(encoding="utf-8") for file in self.files)


def run_program(folder: Path, *command: object, **options) -> str:
    """What a program printed that ended well."""
    status, out, err = Program(folder, *command, **options).ended()
    assert status == 0, err
    return out


def _execute(command: list[str], files: list[Path], cwd: Path, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("drift_peft", "huggingface_hub")]:
        del sys.modules[name]
    assert "DRIFT" not in PEFT_TYPE_TO_CONFIG_MAPPING
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[:0] = command, [str(Path(command[0]).parent)]
        runpy.run_path(command[0], run_name="__main__")
