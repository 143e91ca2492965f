"""The weights of which Δ is taken, of all models at once: the next one is read while the caller has the last one."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import zip_longest

import torch

from ..checkpoints import Checkpoint, Match, layer_order

PAGE = 4096  # bytes


class Weights:
    """Weights of several models, one name after the other, in an order that opens each shard once.

    A context manager, at whose end no other thread reads any more.

    Args:
        sources: role -> model, among them "expert".
        match: under which key each of them holds a weight.
        names: the weights to read.
        device: where their tensors shall be.
        delete_shards: free each shard of the expert that holds none of the weights to come.
    """

    def __init__(
        self,
        sources: dict[str, Checkpoint],
        match: Match,
        names: Sequence[str],
        device: torch.device,
        delete_shards: bool,
    ):
        self._sources, self._match, self._device, self._delete_shards = sources, match, device, delete_shards
        self._names = sorted(names, key=lambda n: (self._shards(n, "expert"), self._shards(n, "base"), layer_order(n)))
        self._left = Counter(shard for name in names for shard in self._shards(name, "expert"))
        self._using = threading.Lock()  # a checkpoint serves one thread at a time
        self._reading, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Weights":
        self._free_used_up()  # what an interrupted build had brought
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._reading:  # else Python's end would cut torch off in the midst of it, and abort
            pass

    def __iter__(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Name and role -> tensor. Whoever asks for the next weight is done with this one."""
        ahead = [self._read_ahead(name) for name in self._names[:1]]
        for name, following in zip_longest(self._names, self._names[1:]):
            tensors = ahead.pop().result()
            if following is not None:
                ahead.append(self._read_ahead(following))
            yield name, tensors
            self._left.subtract(used := self._shards(name, "expert"))
            if not all(self._left[shard] for shard in used):
                self._free_used_up()

    def _read_ahead(self, name: str) -> Future:
        ahead = Future()

        def work() -> None:
            try:
                ahead.set_result(self._read(name))
            except BaseException as error:
                ahead.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # Python's end waits for no download
        return ahead

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        keys = self._match.keys[name]
        with self._using:
            for role, source in self._sources.items():
                for file in source.files_of(keys[role]):
                    source.fetch(file)
            with self._reading:
                if self._ended.is_set():
                    return {}
                tensors = {role: source.tensor(keys[role]) for role, source in self._sources.items()}
                return {role: _page_in(tensor, self._device) for role, tensor in tensors.items()}

    def _shards(self, name: str, role: str) -> list[str]:
        return [str(file) for file in self._sources[role].files_of(self._match.keys[name][role])]

    def _free_used_up(self) -> None:
        expert = self._sources["expert"]
        with self._using:
            for file in expert.files if self._delete_shards else ():
                if not self._left[str(file)]:
                    expert.release(file)


def _page_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a memory-mapped tensor into memory, or to the device, before it is needed."""
    if device.type == "cpu":
        tensor.flatten().view(torch.uint8)[::PAGE].sum()
    return tensor.to(device)
