"""One file of weights, safetensors or `.bin`: its header without the tensors, and tensors mapped into memory.

Also 4-bit weights of bitsandbytes, which are several tensors in such files and one matrix to everybody else.
"""

import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import SafetensorError, safe_open

from .schema import FourBitState, check

Header = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key -> shape and dtype, as stored."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
"""As safetensors headers write them."""

STATE = "quant_state.bitsandbytes__"
FOUR_BIT = re.compile(rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{STATE}(?:nf4|fp4))")
"""Keys beside a 4-bit weight: the weight's key, and what of it they hold."""

_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


class SafetensorsShard:
    """An open safetensors file. ValueError if it is none, or cut short."""

    def __init__(self, file: Path):
        try:
            self._file = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
        self._name = file

    def header(self) -> Header:
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}
        return {key: (tuple(s.get_shape()), read_dtype(s.get_dtype(), self._name)) for key, s in slices.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)


class BinShard:
    """A file that `torch.save` wrote, open. ValueError if it is none, or holds more than tensors."""

    def __init__(self, file: Path):
        if not zipfile.is_zipfile(file):
            with open(file, "rb") as start:
                legacy = start.read(len(_LEGACY)) == _LEGACY
            raise ValueError(
                f"{file} was written before torch 1.6 and cannot be mapped into memory: rewrite it with "
                "torch.save(torch.load(file, weights_only=True), file)"
                if legacy
                else f"{file} is truncated or no torch file: fetch it again"
            )
        self._tensors = load_bin(file, str(file), mmap=True, map_location="cpu")

    def header(self) -> Header:
        return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]


def open_shard(file: Path) -> SafetensorsShard | BinShard:
    """A file of weights, mapped into memory. ValueError if it is damaged."""
    return BinShard(file) if file.suffix == ".bin" else SafetensorsShard(file)


def read_dtype(name: str, file: Path | str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{file} holds tensors of type {name}, which cannot be read: give the full-precision model")
    return DTYPES[name]


def load_bin(file: Path | BinaryIO, name: str, **options) -> dict[str, torch.Tensor]:
    """`torch.load` of a dictionary of tensors, with nothing else in it: no code of the file is run.

    With map_location="meta", only its table of contents is read, which a remote file can give without the rest.
    """
    try:
        content = torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {match[1]}" if match else "is no plain dictionary of tensors"
        raise ValueError(f"{name} {what}, and code of a weight file is not run: ask for a safetensors copy") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{name} is truncated or no torch file: fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not tensors by name: give a saved state dict")
    if others := [key for key, value in content.items() if not isinstance(key, str) or not _is_plain(value, options)]:
        kind = "no plain tensor by name" if isinstance(content[others[0]], torch.Tensor) else "no tensor"
        raise ValueError(f"{name} holds {others[0]}, which is {kind}: give the model as save_pretrained wrote it")
    return {key: tensor.detach() for key, tensor in content.items()}  # some were Parameters


def _is_plain(value: object, options: dict) -> bool:
    """Numbers one behind the other, in memory: not sparse, quantized, or without any."""
    if not isinstance(value, torch.Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout is torch.strided and value.device.type == options["map_location"]


def four_bit_state(packed: torch.Tensor) -> FourBitState:
    """What `quant_state.bitsandbytes__*` says. ValueError if it is none."""
    try:
        return check(json.loads(bytes(packed.tolist())), FourBitState)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"a 4-bit weight has no state that bitsandbytes wrote ({error})") from error


def dequantize(weight: torch.Tensor, companions: dict[str, torch.Tensor]) -> torch.Tensor:
    """A bitsandbytes NF4 or FP4 weight as a matrix [out, in] in the dtype that it was quantized from.

    Args:
        weight: the packed numbers.
        companions: what `FOUR_BIT` finds beside it, such as "absmax", by name.

    Raises:
        ValueError: they do not fit together, which bitsandbytes would not notice before it reads past their ends.
    """
    stored_state = four_bit_state(next(tensor for name, tensor in companions.items() if name.startswith(STATE)))
    numbers = math.prod(stored_state.shape)
    scales = -(-numbers // stored_state.blocksize)
    nested = (
        stored_state.nested_blocksize is not None
        and stored_state.nested_dtype is not None
        and stored_state.nested_offset is not None
    )
    expected = {"absmax": (scales, torch.uint8 if nested else torch.float32), "quant_map": (16, torch.float32)}
    if nested:
        expected["nested_absmax"] = -(-scales // stored_state.nested_blocksize), torch.float32
        expected["nested_quant_map"] = 256, torch.float32
    held = {name: (t.numel(), t.dtype) for name, t in companions.items() if not name.startswith(STATE)}
    if held != expected or weight.numel() * weight.element_size() != -(-numbers // 2):
        raise ValueError(
            f"a 4-bit weight says that it is {stored_state.shape}, and the tensors beside it are of another one"
        )
    state = QuantState.from_dict(dict(companions), device=torch.device("cpu"))
    shape = state.shape
    # As one row: bitsandbytes 0.50 on a CPU lets blocks of 64 start anew in each row, which is not how they were made.
    state.shape = torch.Size([shape.numel()])
    return dequantize_4bit(weight, state).reshape(shape)
