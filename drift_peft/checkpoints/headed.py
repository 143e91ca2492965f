"""A safetensors file of ours, whose header is one JSON string: several keys would be written in random order, and the
same content would not be the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open

from .output import write_tensors
from .schema import Schema, check

WRITTEN = "written.safetensors"  # what a file is called until it is complete


class HeadedFile:
    """Such a file at `path`, called `source` in errors, with its header in `metadata`. ValueError if it is none, of
    another format, or damaged."""

    NOUN: ClassVar[str]  # what an error calls it
    MAKE: ClassVar[str]  # what to do with a file that is none
    HEADER_KEY: ClassVar[str]
    FORMAT: ClassVar[int] = 1
    HEADER: ClassVar[type[Schema]]

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source} is no {self.NOUN}: it is truncated or no safetensors file ({error})") from error
        header = (self._file.metadata() or {}).get(self.HEADER_KEY)
        if header is None:
            raise ValueError(f"{source} is a safetensors file but no {self.NOUN}: {self.MAKE}")
        try:
            self.metadata = json.loads(header)
            written = self.metadata["format"]
            if written == self.FORMAT:
                check(self.metadata, self.HEADER)
                if not self._is_whole():
                    raise ValueError("the file does not hold what its header promises")
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{source} is a damaged {self.NOUN}: make or fetch it again") from error
        if written != self.FORMAT:
            raise ValueError(
                f"{source} is of format {written}, not {self.FORMAT}: read this {self.NOUN} with another drift_peft"
            )

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # It is its file, so it can be a key; a Mapping or Sequence would compare contents and have no hash.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __reduce__(self) -> tuple:  # an open file is not copied or pickled, but opened again
        return type(self), (self.path, self.source)

    def _is_whole(self) -> bool:
        """False, or an error, if the file does not hold what its header promises; the header's form is already
        checked."""
        return True

    def _held(self) -> dict[str, tuple[list[int], str]]:
        """Key -> shape and dtype of each tensor. None is read for that."""
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}
        return {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}


def write_headed(
    kind: type[HeadedFile], folder: Path, output: str | Path, tensors: dict[str, torch.Tensor], metadata: dict
) -> None:
    """Write such a file inside a folder and rename it when it is complete."""
    header = {kind.HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    write_tensors(folder / WRITTEN, tensors, header)
    os.replace(folder / WRITTEN, output)
