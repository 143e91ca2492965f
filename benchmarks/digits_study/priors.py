"""The priors of a world: Δ of its expert, and for the controls, Δ negated, randomized, or of another expert."""

from __future__ import annotations

from pathlib import Path

import torch

from drift_peft import ReasoningPrior, build_prior
from drift_peft.checkpoints import Checkpoint
from drift_peft.demo.compare import quiet
from drift_peft.prior.file import partial_output, write_prior

from .worlds import WORLDS, World

FULL_RANK = 256  # no matrix here has more


def make_priors(folder: Path, key: str) -> None:
    """Build every prior of a world that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    world = WORLDS[key]
    experts = {"plain": world.expert, "hierarchical": world.expert, "wrong": world.wrong, "weak": world.weak}
    with quiet():
        for name, expert in experts.items():
            output = folder / f"{key}-{name}.safetensors"
            if expert is not None and not output.exists():
                reference = world.base if name == "hierarchical" else None
                modules = ("attn", "mlp", "norm")
                build_prior(expert, world.vlm, output, FULL_RANK, reference=reference, modules=modules, progress=False)
        plain = ReasoningPrior.load(folder / f"{key}-plain.safetensors")
        if not (output := folder / f"{key}-negated.safetensors").exists():
            ReasoningPrior.combine({plain: -1.0}, output)
        if not (output := folder / f"{key}-random.safetensors").exists():
            randomize(plain, world, output)


def randomize(prior: ReasoningPrior, world: World, output: Path) -> None:
    """A prior with the same singular values and random singular vectors; norms get a random direction."""
    generator, vlm = torch.Generator().manual_seed(0), Checkpoint(world.vlm)
    tensors, weights = {}, {}
    for name in prior:
        weights[name], held = dict(prior.metadata["weights"][name]), prior.tensors(name)
        if "delta" in held:
            noise = torch.randn(held["delta"].shape, generator=generator)
            held = {"delta": (noise * (held["delta"].float().norm() / noise.norm())).to(held["delta"].dtype)}
        else:
            (m, k), n = held["U"].shape, held["Vh"].shape[1]
            U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q.bfloat16() for size in (m, n))
            W = vlm.tensor(vlm.language_model[name]).float()
            weights[name]["fingerprint"] = ((U[:, :8].float().T @ W) * V[:, :8].float().T).sum(-1).tolist()
            held = {"U": U.contiguous(), "S": held["S"], "Vh": V.T.contiguous()}
        tensors |= {f"{name}.{key}": value for key, value in held.items()}
    with partial_output(output) as folder:
        write_prior(folder, output, tensors, {**prior.metadata, "weights": weights})
