"""A file of answers: what a keep set and an answer set have in common.

    tokens        I32 [tokens]   the answers' tokens, one answer behind the other
    token_ends    I64 [N]   where each answer ends
    top_tokens    I32 [tokens, k]
    top_logprobs  F32 [tokens, k]   in descending order

The header has format, k, tokenizer (of the VLM: its size and hash) and the answers in words.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ..checkpoints import HeadedFile, Watch, write_headed
from .answers import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


class SampleFile(HeadedFile, Sequence[Sample]):
    """Answers in one safetensors file; `[i]` is read from it on access.

    Attributes:
        path: the file.
        source: as given to `load`.
        metadata: the header.
        k: how many log probabilities are known of each answer token.
    """

    def __init__(self, path: Path, source: str):
        self._inode, self._watch = _inode(path), Watch(source, [path])
        super().__init__(path, source)

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
        return replace(self._unpictured(i), image=self._image(i))

    def unpictured(self) -> Iterator[Sample]:
        """All samples without their images, which take time and room to decode."""
        return map(self._unpictured, range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} samples, k {self.k})"

    def _unpictured(self, i: int) -> Sample:
        kind, question = self._asked(i)
        names = ("tokens", "top_tokens", "top_logprobs")
        tokens, top_tokens, top_logprobs = (self._part(name, self._ends, i) for name in names)
        return Sample(
            image=None,
            question=question,
            kind=kind,
            answer=self.metadata["answers"][i],
            tokens=tokens.long(),
            top_tokens=top_tokens.long(),
            top_logprobs=top_logprobs,
        )

    def _asked(self, i: int) -> tuple[str, str]:
        """Kind and text of the question that the i-th answer answers."""
        raise NotImplementedError

    def _image(self, i: int) -> Image | None:
        """What it is about."""
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
        return self._held() == promised and self._says_tokens()

    def _says_tokens(self) -> bool:
        """Is every number a log probability, or a token? Others would add NaN to gradients, or fail in the midst."""
        rows = self.metadata.get("vocabulary", math.inf)
        tokens = (self._file.get_tensor(name) for name in ("tokens", "top_tokens"))
        finite = self._file.get_tensor("top_logprobs").isfinite().all()
        return bool(finite) and all(0 <= int(t.min()) and int(t.max()) < rows for t in tokens)

    def _part(self, name: str, ends: Tensor, i: int) -> Tensor:
        # The file is mapped into memory: what is written into it would be taken for answers, and where it was cut, the
        # process would die. Another file that has taken its name is no matter.
        if _inode(self.path) == self._inode:
            self._watch.check()
        start = int(ends[i - 1]) if i else 0
        return self._file.get_slice(name)[start : int(ends[i])]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


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
    write_headed(kind, folder, output, tensors, metadata)


def tokenizer_identity(processor: Any, size: int | None = None) -> dict:
    """How many tokens the tokenizer has (up to `size`), and the hash of their sorted vocabulary."""
    vocabulary = processor.tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1 if size is None else size
    known = sorted((token, row) for token, row in vocabulary.items() if row < size)
    return {"size": size, "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}
