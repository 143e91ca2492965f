"""What an optimizer guides, looked up once and used until something has changed.

Looking up hundreds of parameters through their modules takes longer than guiding them. So what was found is kept with
the optimizer: who is steered, in which batches, whose steps are counted. Other models that are steered in this process
are looked at once, when an optimizer steps for the first time.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from ..keeping import Known
from .batches import groups_of
from .settings import DriftSettings
from .sharding import Storage
from .steered import Steered, SteeredAdapter


class Plan:
    """What is guided of the parameters that an optimizer updates.

    Args:
        parameters: id() of each parameter with a gradient.
        known: who is steered of all parameters of the optimizer.
        storage: where the optimizer finds its gradients.
        written: of the optimizer's groups, what guidance has written into them so far.

    Attributes:
        groups: what goes through one batched call each.
        parts: settings, and what they guide here: (weight, adapter, factor).
        counted: id() of settings -> the keys under which their guided steps are counted in the optimizer's groups.

    Raises:
        RuntimeError: guidance is not available for these parameters.
    """

    def __init__(self, parameters: Collection[int], known: Known[Steered], storage: Storage, written: dict[str, Any]):
        self.written = written
        self.known, self._changes, self._parameters = known, known.changes(), frozenset(parameters)
        steered = [s for s in known.entries() if s.among(parameters)]
        self.groups = groups_of(steered, parameters, storage)
        parts: dict[int, tuple[DriftSettings, set]] = {}
        for s in (s for s in steered if s.alpha):
            here = {(s.name, s.adapter, factor) for factor in s.among(parameters)}
            parts.setdefault(id(s.config), (s.config, set()))[1].update(here)
        self.parts = [(config, frozenset(here)) for config, here in parts.values()]
        self.counted = _keys(known.entries())
        # Weak references: what steers a module goes with it, whatever becomes of the optimizer. The groups do hold the
        # parameters, so that no other one gets the id() of one that is gone.
        captures = (s.capture for s in steered if isinstance(s, SteeredAdapter) and s.capture is not None)
        self._captures = [weakref.ref(capture) for capture in captures]
        self._states = [(weakref.ref(s), s.state()) for s in steered]
        factors = [p for group in self.groups for members in group.parameters.values() for p in members]
        self._kinds = [(p, p.shape, p.dtype, p.device) for p in factors]

    def serves(self, parameters: Collection[int]) -> bool:
        """Are these the same parameters, and has nothing begun or ceased to be steered?"""
        return self.known.changes() == self._changes and self._parameters == parameters

    def holds(self, parameters: Collection[int]) -> bool:
        """Would all be found as it was? Parameters that were replaced, frozen, added or removed are other ones to the
        optimizer; those that were moved are seen here."""
        return (
            self.serves(parameters)
            and all((s := ref()) is not None and s.state() == state for ref, state in self._states)
            and all(
                p.shape == size and p.dtype is dtype and p.device == device for p, size, dtype, device in self._kinds
            )
        )

    def end_step(self) -> None:
        """The sums of drift_norm="weight" belong to a step that is over."""
        for ref in self._captures:
            if (capture := ref()) is not None:
                capture.stale = True


def _keys(steered: Iterable[Steered]) -> dict[int, list[str]]:
    """Adapters of several models that are called alike are numbered, in the order in which they were made."""
    keys: dict[int, list[str]] = defaultdict(list)
    numbers: Counter[str] = Counter()
    for config, adapter in {(id(s.config), s.adapter): None for s in steered}:
        number = numbers[adapter]
        keys[config].append(f"drift_steps.{adapter}" + (f".{number}" if number else ""))
        numbers[adapter] += 1
    return keys
