"""A pair of models, builds of its prior, and what interrupts them and other long runs."""

import random
import shutil
import signal
import time

import torch
from processes import CONTEXT
from tiny import save_layout, tiny_llm

from drift_peft.prior import build as module
from drift_peft.prior.build import build_prior

LAYERS = 6  # of 7 weights


def save_pair(folder, layers=LAYERS):
    model = tiny_llm("llava", num_hidden_layers=layers)
    save_layout(model, folder / "vlm", max_shard_size="200KB")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_layout(model, folder / "expert", max_shard_size="150KB")
    return folder


def build(folder, **arguments):
    sources = {"expert": folder / "expert", "base": folder / "vlm", "output": folder / "p.safetensors"}
    return build_prior(**{**sources, "rank": 8, "progress": False, **arguments})


def done(folder):
    return sorted(file.name for file in (folder / "p.safetensors.partial").glob("*.safetensors"))


def interrupt(monkeypatch, after, error=KeyboardInterrupt, module=module):
    """The run ends in `error` once so many of its pieces are done."""
    keep, count = module.finish, iter(range(10**6))

    def kept(*args):
        if next(count) == after:
            raise error
        keep(*args)

    monkeypatch.setattr(module, "finish", kept)


def kill_at_any_moment(run, arguments, settings, output, done, pieces, kills, earliest=0.0):
    """SIGKILL at random moments, over several runs; each process forks from one that has imported everything.

    Args:
        done: gives the pieces that are done, of so many.
        earliest: the first moment, as a share of a run.

    Returns:
        how many kills left something to go on with.
    """

    def start():
        process = CONTEXT.Process(target=run, args=arguments, kwargs=settings)
        process.start()
        return process, time.monotonic()

    for _ in range(2):  # the first one waits for the imports
        output.unlink(missing_ok=True)
        process, started = start()
        process.join()
        duration = time.monotonic() - started
    uninterrupted = output.read_bytes()
    output.unlink()

    moments = random.Random(0)
    killed = halfway = 0
    while killed < kills or not output.exists():
        if output.exists():  # one is complete: the next one
            assert output.read_bytes() == uninterrupted
            output.unlink()
            shutil.rmtree(f"{output}.partial", ignore_errors=True)  # killed between its last two steps
        process, _ = start()
        process.join(moments.uniform(earliest * duration, duration) if killed < kills else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        halfway += 0 < len(done()) < pieces
    assert output.read_bytes() == uninterrupted
    return halfway
