"""The base that an adapter was trained on, where that was quantized to 4 bits: how, and which numbers it computed with.

bitsandbytes keeps W in blocks of 64 weights, each a 4-bit code of W divided by the block's largest entry (QLoRA, arXiv
2305.14314, section 3). What such a layer multiplies with is dequantize(quantize(W)).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from .checkpoint import Checkpoint
from .lora import DRIFT_CONFIG, made_without_training
from .schema import DriftRecord, check, read_json
from .update import BLOCK

SHARED, NESTED = 64, 256  # weights that share a scale, and scales that do; transformers knows no others


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """transformers' quantization_config of a model as JSON can hold it; {} for one that is not quantized."""
    config = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_")}


@dataclass(frozen=True)
class Quantization:
    """How the base was quantized in training: `config`, None where it was not; `words` say it to the user. It is
    `assumed` where nothing records it."""

    config: BitsAndBytesConfig | None
    words: str
    assumed: bool = False


def quantization_in_training(adapter: Path, checkpoint: Checkpoint) -> Quantization:
    """What the adapter's folder records, or the default of `assumed_quantization`.

    Raises:
        ValueError: it was quantized to anything but the 4 bits of bitsandbytes.
    """
    record = _record(adapter)
    if record == {}:
        return Quantization(None, "full precision")
    if record is None:
        words = "nf4 with double quantization of the language model's projections (assumed: the adapter records none)"
        return Quantization(assumed_quantization(checkpoint), words, assumed=True)
    method = record.get("quant_method", "an unnamed method")
    if method != "bitsandbytes" or not record.get("load_in_4bit"):
        bits = " in 8 bits" if record.get("load_in_8bit") else ""
        raise ValueError(
            f"adapter {adapter} was trained on a base that {method} had quantized{bits}, and only 4-bit bases of "
            "bitsandbytes can be compared or dequantized: merge onto the base, without verify"
        )
    try:
        config = BitsAndBytesConfig.from_dict(record)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{adapter / DRIFT_CONFIG} holds no quantization of bitsandbytes: {error}") from error
    double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
    return Quantization(config, f"{config.bnb_4bit_quant_type}{double}")


def _record(adapter: Path) -> dict | None:
    """What `quantization_of` said when the adapter was trained, {} if it never was; None if that is not recorded."""
    file = adapter / DRIFT_CONFIG
    if not file.is_file():
        return {} if made_without_training(adapter) else None
    content = read_json(file)
    try:
        return check(content, DriftRecord).quantization
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): save the adapter again") from error


def assumed_quantization(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """NF4 with double quantization of the language model's projections, and of nothing else."""
    projections = checkpoint.decoder.projections
    linear = [name for name, module in checkpoint.model.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[name for name in linear if name not in projections],
    )


class DequantizedCheckpoint(Checkpoint):
    """A full-precision base whose `tensor` gives what a 4-bit model of it computes with, in the base's dtype.

    Args:
        source, revision: as for Checkpoint.
        quantization: how the model is loaded in 4 bits.
    """

    def __init__(self, source: str | Path, revision: str | None, quantization: BitsAndBytesConfig):
        super().__init__(source, revision)
        self.quantization = quantization

    @cached_property
    def four_bit(self) -> dict[str, str]:
        """Raw key of each weight that is quantized -> its module; transformers itself says which these are."""
        model = copy.deepcopy(self.model)
        AutoHfQuantizer.from_config(self.quantization, pre_quantized=False).preprocess_model(model, device_map=None)
        raw = self.in_memory
        modules = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        if lost := [name for name in modules if f"{name}.weight" not in raw]:
            raise ValueError(
                f"{lost[0]}, which was quantized in training, is not among the tensors of {self.source}, so that its "
                "4-bit values cannot be found: merge onto the base, without verify"
            )
        return {raw[f"{name}.weight"]: name for name in modules}

    def tensor(self, raw: str) -> Tensor:
        W = self.stored_tensor(raw)
        return self.through_four_bits(raw, W) if raw in self.four_bit else W

    def through_four_bits(self, raw: str, W: Tensor) -> Tensor:
        """What W of this key is to a 4-bit model, rounded as there: to the base's dtype, then for the computation."""
        dtype = self.dtype(raw)
        return through_four_bits(W, self.quantization).to(dtype).to(self.quantization.bnb_4bit_compute_dtype).to(dtype)


def through_four_bits(W: Tensor, quantization: BitsAndBytesConfig) -> Tensor:
    """dequantize(quantize(W)), bit for bit what bitsandbytes makes of the whole W, but a block at a time.

    Its kernels for the CPU need a multiple of W's memory, and are wrong for some widths that are no multiple of 64:
    here all are 64 wide. The double quantization takes the mean of all of W's scales, so that it comes in between.
    """
    flat, kind = W.reshape(-1), quantization.bnb_4bit_quant_type
    blocks = (pad(block.float(), (0, -len(block) % SHARED)).view(-1, SHARED) for block in flat.split(BLOCK))
    parts = [quantize_4bit(block, blocksize=SHARED, quant_type=kind) for block in blocks]
    if quantization.bnb_4bit_use_double_quant:
        scales = torch.cat([state.absmax for _, state in parts])
        mean = scales.mean()
        scales = dequantize_blockwise(*quantize_blockwise(scales - mean, blocksize=NESTED)) + mean
        for (_, state), own in zip(parts, scales.split([len(state.absmax) for _, state in parts]), strict=True):
            state.absmax = own
    result = torch.empty_like(flat)
    for (codes, state), block in zip(parts, result.split(BLOCK), strict=True):
        block.copy_(dequantize_4bit(codes, state).view(-1)[: len(block)])
    return result.view(W.shape)
