"""A pass of keeping within a step: what the training sees and counts stays as it would be without it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def random_numbers(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of its own; afterwards they go on as if there had been none."""
    devices = {p.device for p in model.parameters() if p.device.type in ("cuda", "xpu")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng([device.index for device in devices], device_type=kind):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.get_device_module(kind).default_generators[device.index].manual_seed(seed)
        yield


@contextlib.contextmanager
def buffers_as_they_are(model: nn.Module) -> Iterator[None]:
    """What a module in train mode counts or averages is vectors and numbers; a matrix in a buffer is a weight."""
    kept = [(b, b._version, b.clone()) for b in model.buffers() if b.dim() <= 1]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in kept:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def without_grad_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Their hooks are for the gradients of the task: what clips these would clip ours, and those times `scale`."""
    heard = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for p, _ in heard:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in heard:
            p._backward_hooks = hooks


@contextlib.contextmanager
def differentiable_checkpoints(model: nn.Module) -> Iterator[None]:
    """Reentrant checkpoints serve `backward()` alone: torch's other kind takes the place of whatever checkpoints the
    layers of a transformers model, such as what Unsloth and LLaMA-Factory put there."""
    attribute, checkpointed = "_gradient_checkpointing_func", []
    for module in model.modules():
        if (function := vars(module).get(attribute)) is not None:
            checkpointed.append((module, function))
            settings = function.keywords if getattr(function, "func", None) is checkpoint else {}
            setattr(module, attribute, functools.partial(checkpoint, **{**settings, "use_reentrant": False}))
    try:
        yield
    finally:
        for module, function in checkpointed:
            setattr(module, attribute, function)


@contextlib.contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """The hook of NEFTune, which Trainer puts on the embedding, adds noise where that is in train mode."""
    embedding = model.get_input_embeddings()
    mode, embedding.training = embedding.training, False  # its own alone: dropout below it stays
    try:
        yield
    finally:
        embedding.training = mode


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """What `module.compile()` compiled in place was compiled for the batches of the training, and for a limited number
    of sizes."""
    compiled = [(module, impl) for module in model.modules() if (impl := module._compiled_call_impl) is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, impl in compiled:
            module._compiled_call_impl = impl
