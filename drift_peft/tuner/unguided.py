"""Adapters that were trained with guidance and were loaded without it: it is said when a step trains one.

Loading is too early to say anything: PEFT makes an adapter trainable as soon as it becomes the active one, and `guide`
steers what is loaded already.
"""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

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
        vars(base).setdefault("drift_unguided", {})[adapter] = self
        UNGUIDED.add(self)

    def __getstate__(self):
        return {**self.__dict__, "_base": self._base()}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state, _base=weakref.ref(state["_base"]))
        UNGUIDED.add(self)

    def among(self, parameters: Container[int]) -> bool:
        """Is any factor of it in `parameters`, by their id(), where nothing steers any of its layers?

        A layer without Δ is never steered, and says nothing of the others.
        """
        base = self._base()
        if base is None or getattr(base, "peft_config", {}).get(self.adapter) is not self._config:
            return False
        layers = [m for m in base.modules() if isinstance(m, LoraLayer) and self.adapter in m.r]
        if any(self.adapter in vars(layer).get("drift_peft", {}) for layer in layers):
            return False
        return any(id(lora_factor(layer, factor, self.adapter)) in parameters for layer in layers for factor in "AB")


def warn_of_unguided(parameters: Container[int]) -> None:
    """Say once of each adapter that a step moves it as plain LoRA."""
    for unguided in UNGUIDED.since():
        if unguided.among(parameters):
            UNGUIDED.discard(unguided)
            warn(unguided.message)
