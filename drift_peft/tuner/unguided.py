"""Adapters that were trained with guidance and were loaded without it: it is said when a step trains one, or at saving
where an optimizer without torch's hooks has trained it.

Loading is too early to say anything: PEFT makes an adapter trainable as soon as it becomes the active one, and `guide`
steers what is loaded already.
"""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..keeping import Registry
from ..warn import warn
from .steered import lora_factor

# Reloading this module keeps what was loaded.
UNGUIDED: Registry[Unguided] = globals().get("UNGUIDED") or Registry()


class Unguided:
    """One adapter of one model, whose base keeps it (`drift_unguided`), so that it follows the model through copies.

    Args:
        base: without PEFT's wrapper.
        message: says what was loaded, and the way out.
    """

    def __init__(self, base: nn.Module, adapter: str, message: str):
        self._base, self.adapter, self.message = weakref.ref(base), adapter, message
        self._config = base.peft_config[adapter]  # another one of this name, later, has another config
        self._loaded = self._changes()
        vars(base).setdefault("drift_unguided", {})[adapter] = self
        UNGUIDED.add(self)

    def __getstate__(self):
        return {**self.__dict__, "_base": self._base()}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state, _base=weakref.ref(state["_base"]), _loaded=0)  # torch counts anew in a copy
        UNGUIDED.add(self)

    def among(self, parameters: Container[int]) -> bool:
        """Is any factor of it in `parameters`, by their id(), where nothing steers any of its layers?"""
        return any(id(factor) in parameters for factor in self._factors())

    def moved(self) -> bool:
        """Has anything written into its factors since they were loaded, to train them without guidance?"""
        return any(factor.requires_grad for factor in self._factors()) and self._changes() > self._loaded

    def _changes(self) -> int:
        """How often its factors were written to, as torch counts it."""
        return sum(factor._version for factor in self._factors() if not factor.is_inference())

    def _factors(self) -> list[Tensor]:
        """None where any of its layers is steered: a layer without Δ never is, and says nothing of the others."""
        base = self._base()
        if base is None or getattr(base, "peft_config", {}).get(self.adapter) is not self._config:
            return []
        layers = [m for m in base.modules() if isinstance(m, LoraLayer) and self.adapter in m.r]
        if any(self.adapter in vars(layer).get("drift_peft", {}) for layer in layers):
            return []
        return [lora_factor(layer, factor, self.adapter) for layer in layers for factor in "AB"]


def warn_of_unguided(parameters: Container[int]) -> None:
    """Say once of each adapter that a step moves it as plain LoRA."""
    for unguided in UNGUIDED.since():
        if unguided.among(parameters):
            UNGUIDED.discard(unguided)
            warn(unguided.message)


def warn_of_moved(base: nn.Module, adapter: str) -> None:
    """Say it of an adapter that is saved after an optimizer without torch's step hooks has moved it."""
    unguided = vars(base).get("drift_unguided", {}).get(adapter)
    if unguided is not None and unguided in UNGUIDED and unguided.moved():
        UNGUIDED.discard(unguided)
        warn(unguided.message)
