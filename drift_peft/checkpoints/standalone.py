"""A standalone model folder whose named tensors are replaced, streaming.

The model is never in memory: each shard is copied and the replaced tensors are overwritten in the copy, one at a time,
so that everything else stays byte for byte what it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm.auto import tqdm

from .checkpoint import INDEX, SINGLE, Checkpoint
from .conversion import Conversion
from .hub import download, is_listed
from .lock import only_writer
from .output import OURS, partial_folder
from .schema import read_json
from .tokenizer import TOKENIZER
from .update import block_rows

# What a model folder needs beside its weights: tokenizer, processor, chat template, remote code, licence.
STANDALONE = (*TOKENIZER, "*.json", "*.jinja", "*.txt", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
STANDALONE += ("additional_chat_templates/*.jinja", "spk_dict.pt")  # the speakers of Qwen2.5-Omni
BESIDE = (*TOKENIZER, "*processor_config.json")  # what hardly a model is without
NOT_COPIED = ("*.index.json", "trainer_state.json")  # other copies of the weights, the base's own training
CONFIGS = {"model": "config.json", "adapter": "adapter_config.json"}  # by what a folder is known to be one


@contextlib.contextmanager
def replaced_when_complete(
    output: Path, overwrite: bool, sources: Collection[str | Path], kind: str = "model"
) -> Iterator[Path]:
    """`<output>.partial/` to work in, renamed to the output at the end, or gone if anything failed.

    An existing folder is `<output>.drift_peft-replaced` for the moment between two renames. A run killed in that
    moment leaves it under that name; the next run on this output puts it back first.

    Args:
        overwrite: replace an existing folder, if it is one of this kind or empty.
        sources: what is read meanwhile, and so must not lie in the output.
        kind: "model" (a folder with config.json) or "adapter" (with adapter_config.json).

    Raises:
        FileExistsError: the output exists and may not be overwritten, is of another kind, or is or holds one of the
            sources; or another process writes it.
        FileNotFoundError, OSError: there is no place for it, or it cannot be written.
    """
    output = output.resolve()
    _refuse_mount(output)
    with only_writer(output):
        _put_back(output)
        _refuse_folder(output, overwrite, sources, kind)
        with partial_folder(output, overwrite) as partial:
            yield partial
            _replace(output, partial)
        (output / OURS).unlink()
        shutil.rmtree(_replaced(output), ignore_errors=True)


def _replaced(output: Path) -> Path:
    return output.with_name(output.name + ".drift_peft-replaced")


def _put_back(output: Path) -> None:
    """What was killed between its two renames has left the output's place empty."""
    if not output.exists() and _replaced(output).exists():
        os.replace(_replaced(output), output)


def _replace(output: Path, partial: Path) -> None:
    if output.exists():
        shutil.rmtree(_replaced(output), ignore_errors=True)
        os.replace(output, _replaced(output))
    try:
        os.replace(partial, output)
    except OSError:
        _put_back(output)
        raise


def _refuse_mount(output: Path) -> None:
    if os.path.ismount(output):  # Path.is_mount is not there on Windows before Python 3.12
        raise FileExistsError(f"output {output} is a mounted volume, which cannot be renamed: name a folder in it")


def _refuse_folder(output: Path, overwrite: bool, sources: Collection[str | Path], kind: str) -> None:
    if output.exists():
        if not overwrite:
            raise FileExistsError(f"output {output} exists: name another folder, or pass overwrite=True (--overwrite)")
        if not output.is_dir() or (any(output.iterdir()) and not (output / CONFIGS[kind]).is_file()):
            raise FileExistsError(f"output {output} exists and is no {kind} folder, so it is not overwritten")
        for source in [read for given in sources for read in (given, *_adapted_by(given))]:
            if Path(source).exists() and Path(source).resolve().is_relative_to(output):
                raise FileExistsError(f"output {output} is or holds {source}, which it is made of: name another folder")


def _adapted_by(source: str | Path) -> list[str]:
    """The model that an adapter in this folder records, if it is one and does: it is of no use without."""
    config = Path(source, CONFIGS["adapter"])
    content = read_json(config) if config.is_file() else None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return [base] if base and isinstance(base, str) else []


def refuse_other_files(checkpoint: Checkpoint) -> None:
    """ValueError for a model that `write_model` cannot write: tensors are overwritten in copies of its files."""
    if others := [file.name for file in checkpoint.files if file.suffix != ".safetensors"]:
        raise ValueError(
            f"{checkpoint.source} holds {others[0]}, and tensors are overwritten in copies of safetensors files only: "
            "load it and save_pretrained it, then give that folder"
        )


def write_model(
    checkpoint: Checkpoint,
    folder: Path,
    replaced: Collection[str],
    blocks: Callable[[str, torch.Tensor], Iterator[torch.Tensor]],
    progress: bool = True,
) -> float | None:
    """Write the checkpoint with everything beside its weights into an empty folder, some of its tensors replaced.

    Args:
        checkpoint: the model to copy; shards, names, and all other tensors stay as they are.
        folder: `<output>.partial/`, as `replaced_when_complete` gives it.
        replaced: keys of the tensors to replace. One that transformers makes of others in the files goes back into
            these.
        blocks: takes a key and its tensor W [rows, ...]; yields what replaces it in fp32, as consecutive blocks of rows
            (see update.py). Each is cast once to the dtype of W.
        progress: show a progress bar on stderr.

    Returns:
        ‖W' − W‖/‖W‖ (Frobenius) over all replaced tensors, as stored; 0 if nothing changed, None if all were zero.

    Raises:
        ValueError: a replaced tensor is not finite or cannot be written back into the form that the files have, or
            the model is not stored as safetensors, or was written to meanwhile.
        OSError: the folder could not be written.
    """
    refuse_other_files(checkpoint)
    companions = _companions(checkpoint)
    try:
        change = _write_shards(checkpoint, folder, replaced, blocks, progress)
        for file in companions:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / file, folder / file)
        checkpoint.refuse_changed()
    except OSError as error:
        checkpoint.refuse_changed()  # a shard that has vanished, too, is no fault of the output
        if error.errno is None:  # of a source, and it says so itself
            raise
        raise OSError(f"output {folder.with_suffix('')} could not be written: {error.strerror}") from error
    return change


@torch.no_grad()
def _write_shards(
    checkpoint: Checkpoint, folder: Path, replaced: Collection[str], blocks: Callable, progress: bool
) -> float | None:
    change = norm = 0.0  # squares
    done = 0
    stored = _Stored(checkpoint, replaced, blocks)
    with tqdm(total=len(stored.keys), desc="merging", unit="weight", disable=not progress) as bar:
        for file in checkpoint.files:
            copied = folder / file.relative_to(checkpoint.folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.fetch(file), copied)
            with open(copied, "r+b") as shard:
                offsets = _tensor_offsets(shard)
                for raw in (raw for raw in stored.keys if checkpoint.keys[raw] == file):
                    bar.set_postfix_str(raw, refresh=False)
                    shard.seek(offsets[raw])
                    W = checkpoint.tensor(raw)
                    with one_thread():
                        squares = _write_tensor(shard, raw, W, stored.blocks(raw, W))
                    change, norm, done = change + squares[0], norm + squares[1], done + 1
                    bar.update()
    if done != len(stored.keys):
        raise ValueError(f"only {done} of {len(stored.keys)} tensors were replaced in {checkpoint.source}")
    if change and not norm:
        return None
    return math.sqrt(change / norm) if change else 0.0


class _Stored:
    """What is replaced, as the files have it: tensors that transformers makes of others are put back into these.

    Attributes:
        keys: in the files.
    """

    def __init__(self, checkpoint: Checkpoint, replaced: Collection[str], blocks: Callable):
        self._checkpoint, self._replaced, self._blocks = checkpoint, {*replaced}, blocks
        made = [name for name in replaced if name not in checkpoint.keys]
        conversions = {checkpoint.layout.conversions[name]: None for name in made}
        self._of = {raw: conversion for conversion in conversions for raw in conversion.sources}
        self.keys = [*(raw for raw in replaced if raw in checkpoint.keys), *self._of]
        self._last: tuple[Conversion, dict[str, torch.Tensor]] | None = None

    def blocks(self, raw: str, W: torch.Tensor) -> Iterator[torch.Tensor]:
        if raw not in self._of:
            return self._blocks(raw, W)
        conversion = self._of[raw]
        if self._last is None or self._last[0] is not conversion:
            self._last = conversion, self._written_back(conversion)
        return iter(self._last[1][raw].split(block_rows(W)))

    def _written_back(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        tensors = {raw: self._checkpoint.stored_tensor(raw) for raw in conversion.sources}
        made = conversion.convert(tensors)
        back = conversion.revert(made)
        if wrong := [raw for raw in tensors if raw not in back or not torch.equal(back[raw], tensors[raw])]:
            raise ValueError(
                f"transformers reads {wrong[0]} of {self._checkpoint.source} in a form that it does not write back "
                "unchanged: load the model, save it with save_pretrained(…, save_original_format=False), and give that"
            )
        for name in self._replaced.intersection(made):
            W = self._checkpoint.tensor(name)
            made[name] = torch.cat([block.to(W.dtype) for block in self._blocks(name, W)])
        return conversion.revert(made)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For what takes less time than several threads wait for one another, such as a block: on a busy machine that is
    most of a merge."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_tensor(shard: BinaryIO, raw: str, W: torch.Tensor, blocks: Iterator[torch.Tensor]) -> tuple[float, float]:
    """Write W' where the file stands, a block of rows at a time. Returns ‖W' − W‖² and ‖W‖²."""
    change = norm = 0.0
    row, W = 0, torch.atleast_1d(W)
    for block in blocks:
        before = W[row : row + len(block)].float()
        row += len(block)
        after = block.to(W.dtype)
        shard.write(after.flatten().view(torch.uint8).numpy())
        after = after.float()
        if (endless := before.isinf() & (after == before)).any():  # as bounds that Gemma 4 clips nothing by
            before, after = (side.masked_fill(endless, 0) for side in (before, after))
        # In fp64: in fp32, squares of weights below 1e-22 vanish.
        change += torch.linalg.vector_norm(after - before, dtype=torch.float64).item() ** 2
        norm += torch.linalg.vector_norm(before, dtype=torch.float64).item() ** 2
    if row != len(W):
        raise ValueError(f"{raw} has {len(W)} rows, and {row} were merged")
    if not change < torch.finfo(torch.float32).max:  # whose squares no model could sum
        raise ValueError(f"{raw} is not finite after the merge: NaN, Inf or an overflow of {W.dtype}")
    return change, norm


def _tensor_offsets(shard: BinaryIO) -> dict[str, int]:
    """Where in the file each tensor's bytes start. The safetensors format: the header's length as a little-endian
    64-bit number, the header as JSON, and the tensors, whose `data_offsets` count from the header's end."""
    start = int.from_bytes(shard.read(8), "little")
    header = json.loads(shard.read(start))
    return {name: 8 + start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Files beside the weights that make the folder stand alone, relative to it. config.json comes last: without it
    no leftover passes for a model.

    Raises:
        FileNotFoundError: of a hub repository, nothing but the weights is in the cache, and there is no network.
    """
    folder = checkpoint.folder
    if checkpoint.revision:
        folder = download(checkpoint.source, checkpoint.revision, STANDALONE)
        found = any(file for pattern in BESIDE for file in folder.glob(pattern))
        if not found and not is_listed(checkpoint.source, folder):
            raise FileNotFoundError(
                f"{checkpoint.source} has no tokenizer or processor here, and only its weights are in the cache: run "
                "once with a network, so that they are fetched as well"
            )
    files = {file for pattern in STANDALONE for file in folder.glob(pattern) if file.is_file()}
    sharded = checkpoint.files != [checkpoint.folder / SINGLE]  # else an index is of other files
    files = {f for f in files if (sharded and f.name == INDEX) or not any(map(f.match, NOT_COPIED))}
    return sorted((file.relative_to(folder) for file in files), key=lambda file: (file.name == "config.json", file))
