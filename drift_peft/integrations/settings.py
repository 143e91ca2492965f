"""The keys that steer and keep, one list for all tools: the fields of DriftConfig and the arguments of keep()."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftModel
from torch import nn

from ..arguments import nearest
from ..keeping import keep
from ..tuner import DriftConfig, guide, is_new

GUIDANCE = {"drift_prior": "prior"}  # key -> field of DriftConfig
GUIDANCE |= {f.name: f.name for f in fields(DriftConfig) if f.name.startswith("drift_") and f.name != "drift_steps"}
KEEPING = {"drift_keep": "keep_set"}  # key -> argument of keep()
KEEPING |= {f"drift_keep_{name}": name for name in list(inspect.signature(keep).parameters)[3:]}  # weight, bound, …


@dataclass
class PluginSettings:
    """What a tool's file or flags say of guidance and keeping; made by `read`."""

    guidance: dict[str, Any]  # of `DriftConfig` and `guide`
    keeping: dict[str, Any]  # of `keep`, without the model and its processor

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> PluginSettings:
        """Take the `drift_…` keys out of a tool's settings; the others are the tool's own.

        Raises:
            ValueError: a key is unknown (the nearest known one is named), a value of the guidance is out of range, or
                there is nothing to steer or keep with.
        """
        own = {key: value for key, value in values.items() if key.startswith("drift_")}
        known = {**GUIDANCE, **KEEPING}
        for key in own:
            if key not in known:
                way_out = nearest(key, known) or f"its settings are {', '.join(known)}"
                raise ValueError(f"'{key}' is no setting of drift_peft; {way_out}")
        settings = cls(*({keys[k]: v for k, v in own.items() if k in keys} for keys in (GUIDANCE, KEEPING)))
        if settings.steers:
            settings.config()
        elif not settings.keeps or settings.guidance.keys() - {"prior"}:
            raise ValueError(
                "drift_prior is missing: set it to a prior's file or hub id to steer with, or drift_keep alone to keep "
                "a keep set's answers."
            )
        if not settings.keeps and settings.keeping.keys() - {"keep_set"}:
            raise ValueError("drift_keep is missing: set it to a keep set's file or hub id, or leave out drift_keep_….")
        return settings

    @property
    def steers(self) -> bool:
        return self.guidance.get("prior") is not None or self.guidance.get("drift_target") == "base"

    @property
    def keeps(self) -> bool:
        return self.keeping.get("keep_set") is not None

    def config(self, **lora) -> DriftConfig:
        """A DriftConfig with these settings and LoRA's."""
        return DriftConfig(**self.guidance, **lora)

    def load(self, model: nn.Module, adapter: str, **kwargs) -> PeftModel:
        """An adapter that is trained further under these settings: one of ours, or plain LoRA of others.

        Raises:
            ValueError: as of `DriftConfig.from_pretrained` and `guide`.
        """
        if DriftConfig.stored(adapter) is None:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True, **kwargs)
            self.guide(model)
            return model
        config = DriftConfig.from_pretrained(adapter, **self.guidance)
        return PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True, **kwargs)

    def guide(self, model: nn.Module) -> None:
        """Steer a model that the tool has wrapped, or trains in full. A new adapter gets the start of a DriftConfig.

        Raises:
            ValueError: as of `guide`, or `drift_start` is set and there is no new adapter with PEFT's own start.
        """
        if not self.steers:
            return
        new = self.guidance.get("prior") is not None and is_new(model)
        if (share := self.guidance.get("drift_start")) and not new:
            raise ValueError(
                f"drift_start={share} is for a new LoRA adapter with PEFT's own start, and here is none, or it has had "
                "its start: leave drift_start out, or merge a part of Δ first, with drift-peft merge-baseline."
            )
        guide(model, init_lora_weights="drift" if new else None, **self.guidance)

    def keep(self, model: nn.Module, load_processor: Callable[[], Any]) -> None:
        """Keep the model near a keep set's answers; its processor is loaded only for that."""
        if self.keeps:
            keep(model, processor=load_processor(), **self.keeping)
