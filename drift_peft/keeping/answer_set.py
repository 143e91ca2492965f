"""The file of an expert's own answers to prompts in text, read and written, in one safetensors file.

    tokens        I32 [tokens]   the answers, one behind the other, in the tokens of the VLM
    token_ends    I64 [N]   where each answer ends
    top_tokens    I32 [tokens, k]
    top_logprobs  F32 [tokens, k]   in descending order

The header holds one JSON string: format, expert (its id and revision), identity (hash of its files), tokenizer (that of
the VLM: its size and hash), k, generation (its settings), the prompts, and the answers in words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints import file_sha256, write_tensors
from .answers import Sample
from .file import tokenizer_identity

HEADER_KEY, FORMAT = "drift_answers", 1
FILE_NAME = "answers.safetensors"
DTYPES = {"tokens": "I32", "token_ends": "I64", "top_tokens": "I32", "top_logprobs": "F32"}


class AnswerSet(Sequence[Sample]):
    """An expert's own answers to prompts in text, in the tokens of a VLM; `answer_set[i]` is read on access.

    Make one with `load` or `make_answer_set`.

    Attributes:
        path: the file.
        source: its path as given.
        metadata: the header, as described at the top of `answer_set`.
    """

    def __init__(self, path: Path):
        self.path, self.source = path, str(path)
        try:
            self._file = safe_open(path, framework="pt")
            header = (self._file.metadata() or {}).get(HEADER_KEY)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no answer set: it is truncated or no safetensors file ({error})") from error
        if header is None:
            raise ValueError(f"{path} is a safetensors file but no answer set: name another file, or delete it")
        try:
            self.metadata = json.loads(header)
            whole = self.metadata["format"] == FORMAT and self._is_whole()
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is a damaged answer set: make it again") from error
        if not whole:
            raise ValueError(f"{path} is a damaged answer set, or one of another drift_peft: make it again")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an answer set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no answer set, or a damaged one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no answer set {path}")
        return cls(Path(path))

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        return file_sha256(self.path)

    def check(self, processor: Any) -> None:
        """ValueError unless this processor's tokenizer has the tokens of the answers."""
        known = self.metadata["tokenizer"]
        if tokenizer_identity(processor, known["size"]) != known:
            raise ValueError(
                f"{self.source} holds answers in another tokenizer's tokens than this {type(processor).__name__}'s: "
                "make it again"
            )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> Sample:
        """The i-th sample. IndexError if there are not so many."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, and none of number {i}")
        i %= len(self)
        part = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
        tokens, top_tokens, top_logprobs = (
            self._file.get_slice(name)[part] for name in ("tokens", "top_tokens", "top_logprobs")
        )
        prompt, answer = self.metadata["prompts"][i], self.metadata["answers"][i]
        return Sample(None, prompt, "text", answer, tokens.long(), top_tokens.long(), top_logprobs)

    __eq__, __hash__ = object.__eq__, object.__hash__  # it is its file

    def __reduce__(self) -> tuple:  # an open file is not copied or pickled, but opened again
        return type(self), (self.path,)

    def _is_whole(self) -> bool:
        header, slices = self.metadata, {name: self._file.get_slice(name) for name in self._file.keys()}
        self._ends = self._file.get_tensor("token_ends")
        samples, tokens, k = len(header["prompts"]), int(self._ends[-1]), header["k"]
        shapes = {"tokens": [tokens], "token_ends": [samples], "top_tokens": [tokens, k], "top_logprobs": [tokens, k]}
        return (
            {name: part.get_shape() for name, part in slices.items()} == shapes
            and {name: part.get_dtype() for name, part in slices.items()} == DTYPES
            and len(header["answers"]) == samples
            and int(self._ends.diff(prepend=self._ends.new_zeros(1)).min()) > 0
            and all(key in header for key in ("expert", "identity", "tokenizer", "generation"))
        )


def write_answer_set(folder: Path, output: Path, answers: Sequence[dict[str, Tensor]], metadata: dict) -> None:
    """Write an answer set inside a folder and rename it when it is complete.

    Args:
        answers: of each prompt, `tokens` [T], `top_tokens` and `top_logprobs` [T, k].
        metadata: the header.
    """
    joined = {name: torch.cat([answer[name] for answer in answers]).contiguous() for name in answers[0]}
    tensors = {
        "tokens": joined["tokens"].int(),
        "token_ends": torch.tensor([len(answer["tokens"]) for answer in answers]).cumsum(0),
        "top_tokens": joined["top_tokens"].int(),
        "top_logprobs": joined["top_logprobs"].float(),
    }
    write_tensors(folder / FILE_NAME, tensors, {HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})
    os.replace(folder / FILE_NAME, output)
