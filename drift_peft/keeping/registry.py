"""What acts on models in this process, known without keeping any of them alive, and from any thread."""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Container, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class OnParameters(Protocol):
    def among(self, parameters: Container[int]) -> object:
        """What it acts on among `parameters`, known by their id(): empty if nothing, as once its model is gone."""


Entry = TypeVar("Entry", bound=OnParameters)


class Registry(Generic[Entry]):
    """Entries in the order of adding, which is the same on all ranks; each one goes with the model that it belongs to.

    One thread may add entries while another one trains.

    Attributes:
        version: grows whenever an entry is added or taken out.
    """

    def __init__(self):
        self.version = 0
        self._entries: dict[int, weakref.ref[Entry]] = {}  # by the version that each one came with
        self._versions: weakref.WeakKeyDictionary[Entry, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        with self._lock:
            if entry in self._versions:
                return
            self.version += 1
            version = self._versions[entry] = self.version
            self._entries[version] = weakref.ref(entry, lambda _: self._entries.pop(version, None))

    def discard(self, entry: Entry) -> None:
        with self._lock:
            self._entries.pop(self._versions.pop(entry, None), None)
            self.version += 1

    def since(self, version: int = 0) -> list[Entry]:
        """What was added after this version and is still there."""
        with self._lock:
            versions = list(self._entries)
            entries = [self._entries.get(v, lambda: None)() for v in versions[bisect.bisect_right(versions, version) :]]
        return [entry for entry in entries if entry is not None]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._versions


class Known(Generic[Entry]):
    """The entries of a registry that act on what one optimizer trains, whether it has a gradient now or not.

    All entries are looked at once, when the optimizer steps for the first time, and later only those that come.

    Args:
        parameters: all of the optimizer's. They are held, so that no other one gets the id() of one that is gone.
    """

    def __init__(self, registry: Registry[Entry], parameters: Sequence[Tensor]):
        self._registry, self._parameters, self._ids = registry, parameters, {id(p) for p in parameters}
        self._version, self._changes = 0, 0
        self._found: list[weakref.ref[Entry]] = []

    def are_of(self, parameters: Sequence[Tensor]) -> bool:
        """Does the optimizer still train these, and no others?"""
        mine = self._parameters
        return len(mine) == len(parameters) and all(a is b for a, b in zip(mine, parameters, strict=True))

    def changes(self) -> int:
        """How often an entry of these has come or been taken out so far."""
        version = self._registry.version
        if version != self._version:
            new = [weakref.ref(entry) for entry in self._registry.since(self._version) if entry.among(self._ids)]
            left = [ref for ref in self._found if (entry := ref()) is not None and entry in self._registry]
            self._changes += bool(new) or len(left) < len(self._found)
            self._version, self._found = version, left + new
        return self._changes

    def entries(self) -> list[Entry]:
        """Those that are still there, in the order of adding."""
        self.changes()
        return [entry for entry in (ref() for ref in self._found) if entry is not None]
