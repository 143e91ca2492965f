"""A base that has taken a part of Δ in: W + λΔ, as merging writes it, and what is left of Δ then.

The merged folder's config.json says so under `drift_merge`, and whoever loads the model finds it in `model.config`,
wherever the folder went. It is a claim: the weights themselves decide whether it is true (see `MergedDelta.moved`).
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat, NonNegativeInt

from ..atomic import write_text
from ..checkpoints import Origin, Schema, at_revision, check, layer_of, module_kind
from .file import PriorFile, PriorVector, PriorWeight

MERGE_KEY = "drift_merge"
HOW_KEY = "drift_merge_baseline"  # of what is no W + λΔ: the settings of merge_baseline


class Claim(Schema):
    """The form of a `MergedDelta` in config.json."""

    scale: FiniteFloat
    base: Origin
    expert: Origin
    reference: Origin | None
    modules: list[str]
    only_layers: list[NonNegativeInt] | None
    skip_first: NonNegativeInt


@dataclass(frozen=True)
class MergedDelta:
    """What `merge_baseline` has added to the language model of a VLM: `scale`·Δ, in some of its weights.

    Attributes:
        scale: λ.
        base, expert, reference: ids of the models, as a prior's header has them; Δ is expert − base, or expert −
            reference if there is one.
        modules, only_layers, skip_first: which weights, as `match_weights` reads it.
    """

    scale: float
    base: dict[str, Any]
    expert: dict[str, Any]
    reference: dict[str, Any] | None
    modules: Sequence[str]
    only_layers: Sequence[int] | None
    skip_first: int

    def scale_of(self, name: str) -> float:
        """λ of a weight, by its canonical name: 0 where nothing was merged."""
        layer = layer_of(name)
        chosen = layer is None or (layer >= self.skip_first and layer in (self.only_layers or [layer]))
        return self.scale if chosen and module_kind(name) in self.modules else 0.0

    def left(self, name: str, weight: PriorWeight | PriorVector) -> PriorWeight | PriorVector:
        """(1 − λ)Δ of a weight. The sign goes to U, since singular values have none."""
        share = 1 - self.scale_of(name)
        if isinstance(weight, PriorVector):
            return replace(weight, delta=share * weight.delta)
        return replace(weight, U=math.copysign(1, share) * weight.U, S=abs(share) * weight.S)

    def moved(self, prior: PriorFile, name: str, U: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
        """λ·u_iᵀ Δ v_i [i] for the columns u_i of U [out, i] and the rows v_i of Vh [i, in]: how far merging moves a
        fingerprint. Δ is what the prior holds of it."""
        weight = prior[name]
        left, right = U.float().mT @ weight.U.float(), Vh.float() @ weight.Vh.float().mT
        return self.scale_of(name) * (left * weight.S * right).sum(-1)

    @property
    def words(self) -> str:
        """Such as "org/vlm + 0.5·(org/expert − org/vlm)"."""
        minus = (self.reference or self.base)["id"]
        return f"{self.base['id']} + {self.scale:g}·({self.expert['id']} − {minus})"

    @property
    def command(self) -> str:
        """What makes it again, without its output."""
        words = ["drift-peft", "merge-baseline", "--method", "task_arithmetic", "--scale", f"{self.scale}"]
        for role, origin in (("expert", self.expert), ("base", self.base), ("reference", self.reference)):
            words += [] if origin is None else [f"--{role}", at_revision(origin["id"], origin.get("revision"))]
        words += ["--modules", *self.modules]
        words += ["--only-layers", *map(str, self.only_layers)] if self.only_layers else []
        words += ["--skip-first", str(self.skip_first)] if self.skip_first else []
        return shlex.join(words)

    def write(self, folder: Path) -> None:
        """Into the config.json of a model's folder."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop(HOW_KEY, None)  # of the base
        _write_config(folder, {**config, MERGE_KEY: asdict(self)})


def forget_merge(folder: Path, how: dict | None = None) -> None:
    """Take what the config.json of a model's folder says of Δ in it away: its weights were changed further.

    Args:
        how: settings of the merge that changed them, as JSON holds them, for whoever asks whether it was this one.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    left = {key: value for key, value in config.items() if key not in (MERGE_KEY, HOW_KEY)}
    left |= {} if how is None else {HOW_KEY: how}
    if left != config:
        _write_config(folder, left)


def read_merge(config: Any) -> MergedDelta | None:
    """What the configuration of a model says of Δ in it; None if it says nothing.

    Raises:
        ValueError: what it says is damaged.
    """
    claim = getattr(config, MERGE_KEY, None)
    if claim is None:
        return None
    try:
        check(claim, Claim)
    except ValueError as error:
        raise ValueError(f"{MERGE_KEY} in the base's config.json is damaged ({error}): merge it again") from error
    return MergedDelta(**{key: claim[key] for key in Claim.model_fields})


def _write_config(folder: Path, config: dict) -> None:
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
