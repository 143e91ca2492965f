"""Gates on the singular directions of Δ beside a frozen model, and how they are trained (METHOD, "Gates on singular
directions").

    W + U diag(σ(γ)·S) Vh   with W, U, S and Vh frozen, and one γ for each direction

Nothing of a weight's size is made: a gated layer adds U·(σ(γ)·S·(Vh·x)) to what it gives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..keeping import GRADIENT_SCALE, Feed, answer_rows, divergence, evaluated
from ..prior import PriorWeight

# What transformers' layers look at. They are in train mode alone for that: what is inside them evaluates.
CHECKPOINTED = {
    "gradient_checkpointing": True,
    "_gradient_checkpointing_func": functools.partial(checkpoint, use_reentrant=False),
    "training": True,
}


class Gate(nn.Module):
    """U diag(σ(γ)·S) Vh of one weight.

    Args:
        weight: of a prior: U [out, k], S [k], Vh [k, in].
        device: where it computes.
        dtype: what U and Vh are held in; γ and S are held in fp32, or in fp64 beside a model that is.

    Attributes:
        gamma: γ [k], from 0 on, where every direction is half taken.
    """

    def __init__(self, weight: PriorWeight, device: torch.device, dtype: torch.dtype):
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("U", weight.U.to(device, dtype))
        self.register_buffer("S", weight.S.to(device, wide))
        self.register_buffer("Vh", weight.Vh.to(device, dtype))
        self.gamma = nn.Parameter(torch.zeros_like(self.S))

    @property
    def taken(self) -> Tensor:
        """σ(γ) [k], the share of each direction that is taken."""
        return self.gamma.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        inner = linear(x.to(self.Vh.dtype), self.Vh) * (self.taken * self.S)
        return linear(inner.to(self.U.dtype), self.U).to(x.dtype)


@contextlib.contextmanager
def gated(modules: Mapping[str, nn.Module], gates: Mapping[str, Gate]) -> Iterator[None]:
    """Each of these linear layers, by its name, also gives what its gate gives."""

    def add(gate: Gate):
        return lambda module, args, output: output + gate(args[0])

    handles = [modules[name].register_forward_hook(add(gate)) for name, gate in gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """The model as it evaluates, none of its parameters trained; with checkpointing, its layers are computed again in
    the backward pass. Afterwards all is as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [{key: vars(layer).get(key) for key in CHECKPOINTED} for layer in layers]
    model.requires_grad_(False)
    try:
        with evaluated(model):
            for layer in layers:
                vars(layer).update(CHECKPOINTED if checkpointing else {"gradient_checkpointing": False})
            yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            for key, value in held.items():
                vars(layer).pop(key, None) if value is None else vars(layer).update({key: value})
        for parameter in trained:
            parameter.requires_grad_(True)


def train_gates(
    model: nn.Module,
    gates: Sequence[Gate],
    kept: Feed,
    answers: Feed | None,
    keep_weight: float,
    alpha: float,
    steps: int,
    rate: float,
    tokens: int,
) -> Iterator[tuple[float, float]]:
    """A step of Adam on γ each time; yields KL(VLM || gated) and KL(expert || gated) of its batches, in nats a token.

    Ours:   κ·KL(VLM || gated) on the keep set  +  KL(expert || gated) on the expert's own answers to text prompts.
    FRISM:  KL(VLM || gated) on the keep set  −  α·‖σ(γ)·S‖²/‖S‖², over all directions. (arXiv 2601.21187; divided by
            ‖S‖² here, so that α does not depend on the pair.)

    Args:
        model: frozen and gated.
        kept, answers: batches of the keep set, and of the expert's answers; without these it is FRISM's.
        keep_weight: κ; FRISM's objective has 1.
        tokens: how many go through the model at a time, padding included, where one sample is not longer.

    Raises:
        ValueError: a divergence or a gradient is not finite.
    """
    gammas = [gate.gamma for gate in gates]
    whole = sum(gate.S.double().square().sum().item() for gate in gates)
    optimizer = torch.optim.Adam(gammas, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        keep_kl = _backward(model, kept, step, tokens, keep_weight)
        if answers is None:
            text_kl = 0.0
            norm = sum((gate.taken * gate.S).square().sum().cpu() for gate in gates)
            (-GRADIENT_SCALE * alpha * norm / whole).backward()
        else:
            text_kl = _backward(model, answers, step, tokens, 1.0)
        _refuse_infinite(step, keep_kl, text_kl, *(gamma.grad for gamma in gammas))
        for gamma in gammas:
            gamma.grad /= GRADIENT_SCALE
        optimizer.step()
        yield keep_kl, text_kl


def _refuse_infinite(step: int, *numbers: float | Tensor) -> None:
    """ValueError before gates are made of divergences or gradients that are none."""
    if not all(torch.as_tensor(number).isfinite().all() for number in numbers):
        raise ValueError(
            f"divergence or gradient is NaN or infinite in step {step + 1}: load the VLM in bfloat16 instead of "
            "float16, or pass a lower rate (--rate)"
        )


def _backward(model: nn.Module, feed: Feed, step: int, tokens: int, weight: float) -> float:
    """Add the gradient of weight · mean KL over the answer tokens of one batch to that of γ, GRADIENT_SCALE times.
    Returns the mean."""
    parts = feed.batch(step, tokens)
    feed.read_ahead(step + 1, tokens)
    answer_tokens, total = sum(len(part.top_tokens) for part in parts), 0.0
    for part in parts:
        loss = divergence(answer_rows(model, part), part).sum() / answer_tokens
        (GRADIENT_SCALE * weight * loss).backward()
        total += loss.item()
    return total
