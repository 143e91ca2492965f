"""What a part of an expert's Δ costs: how far the VLM goes from its own answers, at one scale after another.

The VLM is loaded once. Between two measurements only the scaling of the adapter on it changes, or, without an adapter,
its weights are written anew as W + λ·Δ, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.table import Table
from torch import nn

from ..checkpoints import Checkpoint, Match
from ..keeping import KeepSet, Vlm, measure, refuse_offloaded, summarize, with_room

STEPS = 20  # of the grid on which the largest scale is searched: 0.05, 0.1, …, 1


@dataclass(frozen=True)
class Cost:
    """Of one scale.

    Attributes:
        scale: λ; at 0 it is the VLM itself, whose distance comes of its dtype or its quantization.
        kl: KL(p_vlm || p_model) in nats a token, mean over the keep set's answers.
        kl_interval: the 95 % interval of that mean.
        agreement: share of the tokens that the model would have chosen too.
    """

    scale: float
    kl: float
    kl_interval: tuple[float, float]
    agreement: float


class Scales:
    """The VLM in memory, at any scale of what is transplanted. Its weights are loaded by `of_adapter` or `of_weights`.

    Args:
        base: the VLM: folder, hub id or `id@revision`.
        keep_set: its own answers.
        load_in_4bit: load it in NF4.
        batch_size: answers at a time.
        progress: show a progress bar on stderr.
        processor: as of `Vlm`.

    Attributes:
        costs: what was measured so far, in this order; the VLM itself, at scale 0, is the first.

    Raises:
        ValueError: the keep set is of another model or tokenizer.
    """

    def __init__(
        self,
        base: str | Path,
        keep_set: KeepSet,
        load_in_4bit: bool,
        batch_size: int,
        progress: bool,
        processor: Any = None,
    ):
        self._vlm = Vlm(base, processor, load_in_4bit)
        keep_set.check(self._vlm.processor)
        keep_set.check_config(self._vlm.config)
        self._keep_set, self._batch_size, self._progress = keep_set, batch_size, progress
        self._in_4bit_helps = not load_in_4bit
        self.costs: list[Cost] = []

    def of_adapter(self, folder: Path) -> None:
        """Have the scale be a factor of an adapter's own scaling."""
        model = PeftModel.from_pretrained(self._loaded(), str(folder))
        own = {layer: dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)}

        def set_scale(scale: float) -> None:
            for layer, scaling in own.items():
                layer.scaling.update({name: scale * value for name, value in scaling.items()})

        self._begin(model, set_scale)

    def of_weights(self, sources: dict[str, Checkpoint], match: Match) -> None:
        """Have the scale be λ in W + λ·Δ of all matched weights, which are not in 4 bits."""
        self._in_4bit_helps = False
        model = self._loaded()
        names = {raw: name for name, raw in sources["base"].in_memory.items()}

        @torch.no_grad()
        def set_scale(scale: float) -> None:
            for keys in match.keys.values():
                W = {role: sources[role].tensor(key).float() for role, key in keys.items()}
                delta = W["expert"] - W.get("reference", W["base"])
                model.get_parameter(names[keys["base"]]).copy_(W["base"] + scale * delta)

        self._begin(model, set_scale)

    def cost(self, scale: float) -> Cost:
        """What this scale costs, measured once."""
        for known in self.costs:
            if known.scale == scale:
                return known
        self._set_scale(scale)
        with with_room(f"{self._batch_size} answers", self._in_4bit_helps):
            distances = measure(self._model, self._keep_set, self._vlm.processor, self._batch_size, self._progress)
        total = summarize(distances)["total"]
        self.costs.append(Cost(scale, total["kl"], tuple(total["kl_interval"]), total["agreement"]))
        return self.costs[-1]

    def largest_below(self, budget: float) -> float:
        """The largest scale of the grid that costs less than `budget`, by bisection: the cost grows with the scale.

        Raises:
            ValueError: the VLM itself, or the grid's smallest scale, costs as much.
        """
        if (own := self.cost(0.0).kl) >= budget:
            raise ValueError(
                f"the VLM as it is loaded here is at {own:.3g} nats a token from its own answers already, which is no "
                f"less than budget={budget:g}: raise the budget (--budget), or load it as it was when it answered"
            )
        below, above = 0, STEPS + 1  # what costs less, and what does not, as far as is known
        step = STEPS  # the whole Δ first
        while above - below > 1:
            if self.cost(step / STEPS).kl < budget:
                below = step
            else:
                above = step
            step = (below + above) // 2
        if not below:
            raise ValueError(
                f"even scale {1 / STEPS:g} costs {self.cost(1 / STEPS).kl:.3g} nats a token, which is no less than "
                f"budget={budget:g}: raise the budget (--budget), or train with DRIFT and a keep set instead"
            )
        return below / STEPS

    def _loaded(self) -> nn.Module:
        refuse_offloaded(self._vlm.model, self._vlm.origin["id"], "measuring what Δ costs")
        return self._vlm.model

    def _begin(self, model: nn.Module, set_scale: Callable[[float], None]) -> None:
        self._model, self._set_scale = model, set_scale
        self.cost(0.0)


def cost_table(costs: list[Cost], chosen: float) -> Table:
    """Scale, KL and agreement, for the terminal."""
    table = Table("scale", "KL, nats a token", "95 % interval", "same tokens", title="distance from the VLM's answers")
    for cost in sorted(costs, key=lambda cost: cost.scale):
        low, high = cost.kl_interval
        taken = " (taken)" if cost.scale == chosen else ""
        table.add_row(
            f"{cost.scale:g}{taken}", f"{cost.kl:z.4f}", f"{low:z.4f} to {high:z.4f}", f"{cost.agreement:.1%}"
        )
    return table
