"""A file of answers: what a keep set and an answer set have in common.

    tokens        I32 [tokens]   the answers' tokens, one answer behind the other
    token_ends    I64 [N]   where each answer ends
    top_tokens    I32 [tokens, k]
    top_logprobs  F32 [tokens, k]   in descending order

The header is one JSON string, with format, k, tokenizer (of the VLM: its size and hash) and the answers in words among
it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints import Schema, check, file_sha256, write_tensors
from .answers import Sample

WRITTEN = "written.safetensors"  # what it is called until it is complete


class SampleFile(Sequence[Sample]):
    """Answers in one safetensors file; `[i]` is read from it on access.

    Attributes:
        path: the file.
        source: as given to `load`.
        metadata: the header.
        k: how many log probabilities are known of each answer token.
    """

    NOUN: ClassVar[str]  # what an error calls it
    MAKE: ClassVar[str]  # what to do with a file that is none
    HEADER_KEY: ClassVar[str]
    FORMAT: ClassVar[int] = 1
    HEADER: ClassVar[type[Schema]]

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        try:
            self._file = safe_open(path, framework="pt")
            header = (self._file.metadata() or {}).get(self.HEADER_KEY)
        except (SafetensorError, OSError) as error:
            reason = f"it is truncated or no safetensors file ({error})"
            raise ValueError(f"{source} is no {self.NOUN}: {reason}") from error
        if header is None:
            raise ValueError(f"{source} is a safetensors file but no {self.NOUN}: {self.MAKE}")
        damaged = f"{source} is a damaged {self.NOUN}: make or fetch it again"
        try:
            self.metadata = json.loads(header)
            written = self.metadata["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(damaged) from error
        if written != self.FORMAT:
            raise ValueError(
                f"{source} is of format {written}, not {self.FORMAT}: read this {self.NOUN} with another drift_peft"
            )
        try:
            check(self.metadata, self.HEADER)
            whole = self._is_whole()
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(damaged) from error
        if not whole:
            raise ValueError(damaged)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        return file_sha256(self.path)

    def has_tokens_of(self, processor: Any) -> bool:
        """Are the answers in this processor's tokens? Tokens that were added since then are no matter."""
        known = self.metadata["tokenizer"]
        return tokenizer_identity(processor, known["size"]) == known

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i):
        """The i-th sample, or those of a slice. IndexError if there are not so many."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, and none of number {i}")
        i %= len(self)
        names = ("tokens", "top_tokens", "top_logprobs")
        tokens, top_tokens, top_logprobs = (self._part(name, self._ends, i) for name in names)
        return Sample(
            **self._asked(i),
            answer=self.metadata["answers"][i],
            tokens=tokens.long(),
            top_tokens=top_tokens.long(),
            top_logprobs=top_logprobs,
        )

    # It is its file; a Sequence would compare contents.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __reduce__(self) -> tuple:  # an open file is not copied or pickled, but opened again
        return type(self), (self.path, self.source)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} samples, k {self.k})"

    def _asked(self, i: int) -> dict:
        """What the i-th answer answers: image, question and kind of its `Sample`."""
        raise NotImplementedError

    def _is_whole(self) -> bool:
        """Read what says where a sample is. False, or an error, if the file does not hold what its header promises."""
        self.k, self._ends = self.metadata["k"], self._file.get_tensor("token_ends")
        return len(self.metadata["answers"]) == len(self._ends) and grows(self._ends)

    def _holds(self, beside: dict[str, tuple[list[int], str]]) -> bool:
        """Are these tensors, by shape and dtype, and the answers' own all that the file holds?"""
        tokens, samples = int(self._ends[-1]), len(self._ends)
        promised = {**beside, "tokens": ([tokens], "I32"), "token_ends": ([samples], "I64")}
        promised |= {"top_tokens": ([tokens, self.k], "I32"), "top_logprobs": ([tokens, self.k], "F32")}
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        held = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        return held == promised and self._says_tokens()

    def _says_tokens(self) -> bool:
        """Is every number a log probability, or a token? Others would add NaN to gradients, or fail in the midst."""
        rows = self.metadata.get("vocabulary", math.inf)
        tokens = (self._file.get_tensor(name) for name in ("tokens", "top_tokens"))
        finite = self._file.get_tensor("top_logprobs").isfinite().all()
        return bool(finite) and all(0 <= least and most < rows for least, most in (t.aminmax() for t in tokens))

    def _part(self, name: str, ends: Tensor, i: int) -> Tensor:
        start = int(ends[i - 1]) if i else 0
        return self._file.get_slice(name)[start : int(ends[i])]


def grows(ends: Tensor) -> bool:
    """Is no part empty, of those that end there?"""
    return int(ends.diff(prepend=ends.new_zeros(1)).min()) > 0


def write_sample_file(
    kind: type[SampleFile],
    folder: Path,
    output: Path,
    answers: Sequence[dict[str, Tensor]],
    metadata: dict,
    beside: dict[str, Tensor] | None = None,
) -> None:
    """Write such a file inside a folder and rename it when it is complete.

    Args:
        answers: of each sample, `tokens` [T], `top_tokens` and `top_logprobs` [T, k].
        metadata: the header.
        beside: the file's other tensors.
    """
    joined = {name: torch.cat([answer[name] for answer in answers]).contiguous() for name in answers[0]}
    tensors = {
        **(beside or {}),
        "tokens": joined["tokens"].int(),
        "token_ends": torch.tensor([len(answer["tokens"]) for answer in answers]).cumsum(0),
        "top_tokens": joined["top_tokens"].int(),
        "top_logprobs": joined["top_logprobs"].float(),
    }
    header = {kind.HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    write_tensors(folder / WRITTEN, tensors, header)
    os.replace(folder / WRITTEN, output)


def tokenizer_identity(processor: Any, size: int | None = None) -> dict:
    """How many tokens the tokenizer has (up to `size`), and the hash of their sorted vocabulary."""
    vocabulary = processor.tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1 if size is None else size
    known = sorted((token, row) for token, row in vocabulary.items() if row < size)
    return {"size": size, "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}
