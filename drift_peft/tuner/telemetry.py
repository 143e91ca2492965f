"""What has happened so far: where training stands against the prior, for plain loops and in the logs of Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..arguments import typed
from ..checkpoints import module_kind
from ..keeping import keep_telemetry, keepings_of
from ..prior import ReasoningPrior
from . import guidance
from .config import DriftConfig
from .sharding import values
from .steered import Stack, Steered, SteeredAdapter, all_steered, lora_layers, steered_of


@typed
@torch.no_grad()
def telemetry(model: torch.nn.Module, prior: ReasoningPrior | str | Path | None = None) -> dict[str, float | int]:
    """Where a model stands against the prior. It waits for the device once, and once more where `keep` keeps the model.
    Under FSDP2 every process has to call it.

    Returns, over everything steered in total and per module kind (`alignment/attn`, …):

        guided_steps    optimizer steps that were guided so far (no kinds)
        alignment       cosine of s·B·A and Δ_r (of W − W_0 and Δ_r for tensors that are trained themselves)
        absorbed        ⟨s·B·A, Δ_r⟩/‖Δ_r‖²
        gradient_cosine cosine of gradient and direction in the last step, mean over layers and factors
        bias_ratio      ‖bias‖/‖gradient‖ in the last step, likewise
        repeated_steps  steps taken twice on the same gradients, if there were any

    and of a model that `keep` keeps, steered or not, from its first step on:

        keep_kl         KL(VLM || model) per answer token on the last batch of the keep set, in nats
        keep_ratio      ‖what keeping added‖/‖gradient‖ there

    `decoupled` has no gradient bias, and so neither of its two numbers. With `prior` any LoRA model is measured against
    it, steered or not.

    Raises:
        ValueError: nothing of the model is steered or kept (or, with `prior`, no LoRA layer has a Δ).

    Example:
        >>> model = get_peft_model(vlm, DriftConfig(prior="prior.safetensors", r=8, task_type="CAUSAL_LM"))
        >>> train(model)
        >>> seen = telemetry(model)
        >>> seen["guided_steps"], 0 < seen["absorbed"] < 1, 0 < seen["alignment/attn"] < 1
        (2, True, True)
    """
    steered = guided = steered_of(model)
    if prior is not None:
        prior = prior if isinstance(prior, ReasoningPrior) else ReasoningPrior.load(prior)
        settings = DriftConfig(prior=prior.source)
        steered = [
            SteeredAdapter(layer, a, name, settings, prior[name])
            for name, layer, a in lora_layers(model)
            if name in prior
        ]
    kept = keep_telemetry(model) if prior is None else {}
    if not steered and prior is None and keepings_of(model):
        return kept
    if not steered:
        idle = {s.adapter for s in all_steered(model) if s.adapter}
        if idle and prior is None:
            name = min(idle)
            raise ValueError(f"No active adapter is steered, but '{name}' is: call model.set_adapter('{name}') first.")
        if prior is not None:
            raise ValueError(
                f"No active LoRA layer of this model has a Δ in {prior.source}: leave prior out for what is steered."
            )
        raise ValueError("No layer of this model is steered: wrap it with DriftConfig or guide(model, prior) first.")
    return of_steered(steered, guided) | kept


@torch.no_grad()
def of_steered(steered: list[Steered], guided: list[Steered]) -> dict[str, float | int]:
    """What `telemetry` says of what is steered, with the steps of what `guided` it."""
    configs = {id(s.config): s.config for s in guided}.values()
    steps = max((int(config.drift_steps) for config in configs), default=0)
    result: dict[str, float | int] = {"guided_steps": steps}
    if repeated := sum(config.repeated_steps for config in configs):
        result["repeated_steps"] = repeated

    device = steered[0].parameter(steered[0].factors[0]).device
    last_steps = {s.stack: s.stack.last_step() for s in steered if s.stack is not None}
    sums: dict[str, Tensor] = {}
    for s in steered:
        row = torch.stack([*_position(s), *_last_step(s, last_steps)]).to(device)  # layers may lie on several devices
        for kind in ("", f"/{module_kind(s.name)}"):
            sums[kind] = sums[kind] + row if kind in sums else row
    for kind, row in zip(sums, torch.stack([*sums.values()]).tolist(), strict=True):
        inner, moved, delta, cosine, ratio, steps = row
        if delta > 0:
            result[f"alignment{kind}"] = inner / (moved * delta) ** 0.5 if moved > 0 else 0.0
            result[f"absorbed{kind}"] = inner / delta
        if steps > 0:
            result[f"gradient_cosine{kind}"], result[f"bias_ratio{kind}"] = cosine / steps, ratio / steps
    return result


def _position(s: Steered) -> tuple[Tensor, Tensor, Tensor]:
    """⟨M, Δ_r⟩, ‖M‖² and ‖Δ_r‖² in fp32, M = s·B·A or W − W_0. All are 0 where one of them is not known."""
    first = values([s.parameter(s.factors[0])])[0].float()
    prior = {key: value.to(first.device, torch.float32) for key, value in s.prior.items()}
    zero = torch.zeros((), device=first.device, dtype=torch.float32)
    if isinstance(s, SteeredAdapter):
        if "U" not in prior:
            return zero, zero, zero
        A, B = first, values([s.parameter("B")])[0].float()
        U, S, Vh = prior["U"], prior["S"], prior["Vh"]
        inner = s.scaling * (S * ((U.mT @ B) * (A @ Vh.mT).mT).sum(-1)).sum()
        return inner, s.scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum(), guidance.gram_norm(U, S, Vh) ** 2
    if "W0" not in prior or len(prior) == 1:
        return zero, zero, zero
    moved = first - prior["W0"]
    if "delta" in prior:
        return (moved * prior["delta"]).sum(), moved.square().sum(), prior["delta"].square().sum()
    U, S, Vh = prior["U"], prior["S"], prior["Vh"]
    inner = (S * ((U.mT @ moved) * Vh).sum(-1)).sum()
    return inner, moved.square().sum(), guidance.gram_norm(U, S, Vh) ** 2


def _last_step(s: Steered, last_steps: dict[Stack, tuple | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, ratio and 1 of the last guided step, where the parameters are now; zeros before it."""
    device = s.parameter(s.factors[0]).device
    seen = None if s.stack is None else last_steps[s.stack]
    if seen is None:
        zero = torch.zeros((), device=device, dtype=torch.float32)
        return zero, zero, zero
    i = [member() for member in s.stack.members].index(s)
    cosine, ratio = (numbers[i].to(device, torch.float32) for numbers in seen)
    return cosine, ratio, torch.ones_like(cosine)
