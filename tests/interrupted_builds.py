"""A pair of models, builds of its prior, and what interrupts them."""

import torch
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


def interrupt(monkeypatch, after, error=KeyboardInterrupt):
    """The build ends in `error` once so many weights are done."""
    keep, count = module.finish, iter(range(10**6))

    def kept(*args):
        if next(count) == after:
            raise error
        keep(*args)

    monkeypatch.setattr(module, "finish", kept)
