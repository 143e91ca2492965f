"""A merged folder against what was trained: the logits of both, beside those of the other ways to serve the adapter."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from ..builds import explained
from ..checkpoints import Checkpoint, DequantizedCheckpoint, Quantization, Update, assumed_quantization
from ..keeping import as_templates_are_read, image_mode
from ..warn import first_line, warn

VERIFY_TOKENS = 32
SIDE = 336  # pixels of an image prompt, in whole patches of 12, 14 or 16 where a processor does not resize
ONTO = {"base": "merged into the base", "dequantized": "merged onto the dequantized base"}

Logits = dict[str, Tensor]
"""Prompt ("text" or "image") -> logits of its last VERIFY_TOKENS tokens."""


@dataclass(frozen=True)
class Row:
    """One way to serve: ‖logits − logits of what was trained‖/‖the latter‖, by prompt; None if not measured."""

    name: str
    text: float
    image: float | None

    @property
    def worst(self) -> float:
        return max(self.text, self.image or 0)


@dataclass(frozen=True)
class Verification:
    """What `verify_merge` found.

    Attributes:
        rows: the ways to serve; the first is what was trained.
        trained_on: how the base was quantized in training.
        no_image: why nothing was measured on an image prompt; None if it was.
        verdict: what the rows mean, in words.
        logits_error: of the merged folder against what it stands for, base + adapter, on text; with onto="dequantized",
            the base as it was trained on.
    """

    rows: list[Row]
    trained_on: str
    no_image: str | None
    verdict: str
    logits_error: float


def check_memory(checkpoint: Checkpoint) -> None:
    """Refuse to load a model in fp32, as verifying does, where it is larger than the memory that is free.

    Raises:
        ValueError: there is too little.
    """
    needed, free = _fp32_bytes(checkpoint) / 1e9, psutil.virtual_memory().available / 1e9
    if needed > free:
        raise ValueError(
            f"verifying loads {checkpoint.source} in fp32, which takes {needed:.2g} GB of memory, and {free:.2g} GB "
            "are free: make room, or merge without verifying"
        )


def _fp32_bytes(checkpoint: Checkpoint) -> int:
    return 4 * sum(math.prod(checkpoint.shape(raw)) for raw in checkpoint.keys)


@torch.no_grad()
def verify_merge(
    checkpoint: Checkpoint,
    adapter: Path,
    merged: Path,
    updates: dict[str, Update],
    onto: str,
    trained: Quantization,
    progress: bool = True,
) -> Verification:
    """Compare a merged folder with the adapter on its base by PEFT, in fp32 on the CPU, one model after the other.

    Args:
        checkpoint: the full-precision base.
        adapter, merged: their folders.
        updates: what the adapter does to the base.
        onto: what the folder was merged onto, one of ONTO.
        trained: how the base was quantized in training; if it was not, serving in 4 bits means the default.
        progress: say on stderr how much memory this takes, before it does.

    Raises:
        ValueError: PEFT or transformers cannot load what they are given, the model wants more than text, or the merge
            is wrong.
    """
    if progress:
        size = f"{_fp32_bytes(checkpoint) / 1e9:.2g} GB of memory"
        print(f"verifying: the base and the merged model are loaded in fp32, in turn, {size} each", file=sys.stderr)
    quantization = trained.config or assumed_quantization(checkpoint)
    dequantized = DequantizedCheckpoint(checkpoint.source, checkpoint.revision, quantization)
    prompts, no_image = _prompts(checkpoint, merged)

    base = _load(checkpoint, checkpoint.folder)
    _refuse_chance(base, prompts)
    weights = _weights(checkpoint, base)
    adapted = _adapted(base, adapter, updates)
    full, full_alone = _with_and_without(adapted, prompts)
    _quantize(weights, dequantized)
    four_bit, four_bit_alone = _with_and_without(adapted, prompts)
    if trained.config is not None:
        adapted.unload()
        _merge(_weights(checkpoint, base), dequantized if onto == "base" else checkpoint, dequantized.four_bit, updates)
        other = _logits(base, prompts)
    del base, adapted, weights
    gc.collect()
    model = _load(checkpoint, merged)
    folder = _logits(model, prompts)
    _quantize(_weights(checkpoint, model), dequantized)
    again = _logits(model, prompts)
    del model
    gc.collect()  # Windows cannot rename a folder with a mapped file

    stands_for, alone = (full, full_alone) if onto == "base" else (four_bit, four_bit_alone)
    error, effect = _errors(folder, stands_for)["text"], _errors(alone, stands_for)["text"]
    lost = _check(checkpoint, updates, error, effect)

    here = f"{ONTO[onto]} (this folder)"
    if trained.config is not None:
        elsewhere = next(name for kind, name in ONTO.items() if kind != onto)
        expected, ways = four_bit, {"the adapter on the 4-bit base, as trained": four_bit, here: folder}
        ways |= {elsewhere: other, "this folder, quantized to 4 bits again": again}
        ways |= {"the 4-bit base alone": four_bit_alone}
    else:
        expected, ways = full, {"the adapter on the base, as trained": full, here: folder}
        ways |= {"the adapter on the base in 4 bits": four_bit, "this folder, quantized to 4 bits": again}
        ways |= {"the base alone": full_alone}
    rows = [Row(name, **{"image": None, **_errors(logits, expected)}) for name, logits in ways.items()]
    words = _verdict_four_bit(onto, *rows[1:]) if trained.config is not None else _verdict_full(*rows[1:])
    if trained.assumed:
        exact = Row(here, **{"image": None, **_errors(folder, full)})
        words = (
            "The adapter does not say how its base was in training. If it was in full precision, "
            f"this folder is {_off(exact)} what was trained. If it was in 4 bits: {words[0].lower()}{words[1:]}"
        )
    return Verification(rows, trained.words, no_image, " ".join([*lost, words]), error)


def _check(checkpoint: Checkpoint, updates: dict[str, Update], error: float, effect: float) -> list[str]:
    """Refuse a wrong merge; returns, and warns of, what rounding has undone.

    Each weight was rounded once, by at most u = eps/2 of itself. The roundings of n weights are independent, so their
    sum stays within √n·u of the logits; the floor is what fp32 makes of another order of summation. And rounding to
    the nearest moves no weight farther than the adapter did, so the base alone must be off by more.
    """
    dtype = max((checkpoint.dtype(raw) for raw in updates), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = min(effect, max(1e-4, math.sqrt(len(updates)) * torch.finfo(dtype).eps / 2))
    if not error <= tolerance:
        raise ValueError(
            f"the merged model's logits are {error:.2%} off those of base + adapter, and rounding to {dtype} explains "
            f"at most {tolerance:.2%}: the merge into {checkpoint.source} went wrong"
        )
    if error <= effect / 2:
        return []
    lost = (
        f"Rounding to {dtype} undoes much of this adapter: the merged model's logits are {error:.2%} off those of "
        f"base + adapter, and those of the base alone {effect:.2%}. Serve it unmerged, or train it further."
    )
    warn(lost)
    return [lost]


def _verdict_four_bit(onto: str, folder: Row, other: Row, again: Row, alone: Row) -> str:
    """Of an adapter that was trained on a 4-bit base."""
    base, dequantized = (folder, other) if onto == "base" else (other, folder)
    if base.worst > alone.worst:
        first = "The rounding noise of the 4-bit base exceeds the adapter's own effect: merged into the base"
    else:
        first = "Merged into the base"
    first += f", the model is {_off(base)} what was trained, and without the adapter {_off(alone)}; "
    first += f"merged onto the dequantized base (--onto dequantized) it is {_off(dequantized)}: "
    first += "serve that where exactly the trained function is wanted."
    lead = f"Quantized to 4 bits again, this folder is {_off(again)} what was trained"
    if again.worst > alone.worst:
        return f"{first} {lead}, farther than without the adapter: in 4 bits, serve the adapter unmerged."
    if again.worst > alone.worst / 2:
        return f"{first} {lead} and loses much of the adapter: in 4 bits, serve the adapter unmerged."
    return f"{first} {lead}; in 4 bits, the adapter unmerged is exactly what was trained."


def _verdict_full(folder: Row, unmerged: Row, again: Row, alone: Row) -> str:
    """Of an adapter that was trained on a full-precision base."""
    near, far = sorted([(unmerged, "the adapter unmerged"), (again, "this folder quantized")], key=lambda r: r[0].worst)
    first = f"Serve this folder: it is {_off(folder)} what was trained, and the base alone {_off(alone)}."
    second = f"In 4 bits, {near[1]} is closer ({_off(near[0])}) than {far[1]} ({_off(far[0])})"
    if near[0].worst > alone.worst:
        second += ", and both are farther off than the base without the adapter"
    return f"{first} {second}."


def _off(row: Row) -> str:
    return f"{float(f'{100 * row.worst:.2g}'):g}% off"


def _prompts(checkpoint: Checkpoint, folder: Path) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """Prompt -> what the model takes; and why there is none with an image, if so."""
    settings = checkpoint.config.to_dict().items()
    special = [value for key, value in settings if key.endswith(("_token_id", "_token_index"))]  # images have no text
    plain = [i for i in range(checkpoint.text_config.vocab_size) if i not in special]
    tokens = torch.tensor([plain[:: max(1, len(plain) // VERIFY_TOKENS)][:VERIFY_TOKENS]])
    prompts = {"text": {"input_ids": tokens}}
    if checkpoint.auto_class is not AutoModelForImageTextToText:
        return prompts, "the model takes no images"
    try:
        return {**prompts, "image": _image_prompt(folder)}, None
    except Exception as error:  # of the libraries of whatever processor this is
        return prompts, first_line(explained(error))


def _image_prompt(folder: Path) -> dict[str, Any]:
    """A picture of noise, of the colours that the folder's processor takes, and a question, as it prepares them."""
    from PIL import Image  # every image processor needs it, and nothing else here does

    held = any(folder.glob("*processor_config.json"))  # else transformers' message is about the hub
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False) if held else None
    if not isinstance(processor, ProcessorMixin):
        raise ValueError("the folder holds no processor")
    pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.numpy()).convert(image_mode(processor))
    question = {"type": "text", "text": "What is in the picture?"}
    turn = {"role": "user", "content": [{"type": "image"}, question]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = {"text": [text], "images": [[picture]], **as_templates_are_read(processor, text)}
    return dict(processor(**inputs, return_tensors="pt"))


def _load(checkpoint: Checkpoint, folder: Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a checkpoint without a head gets a random one, the same for both
        load = partial(checkpoint.auto_class.from_pretrained, folder, dtype=torch.float32)
        if hasattr(checkpoint.model, "thinker"):  # then transformers cannot say what it has not found
            return load().eval()
        model, info = load(output_loading_info=True)
    if lost := sorted(key for key in info["missing_keys"] if "lm_head" not in key):
        raise ValueError(f"transformers does not find {lost[0]} in {folder}, so the merge cannot be verified with it")
    return model.eval()


def _adapted(base: nn.Module, adapter: Path, updates: dict[str, Update]) -> PeftModel:
    if not any(update.module.startswith("thinker.") for update in updates.values()):
        base = _thinking(base)  # which an adapter may have been trained on alone
    try:
        with warnings.catch_warnings():  # PEFT only warns when a name finds no weight
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(base, str(adapter), torch_device="cpu").eval()
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"PEFT cannot load {adapter} onto its base to verify the merge: {reason}") from error


def _weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Raw key -> the model's parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {raw: parameters[name] for name, raw in checkpoint.in_memory.items() if name in parameters}


def _quantize(weights: dict[str, Tensor], dequantized: DequantizedCheckpoint) -> None:
    """Put in place of each weight what a 4-bit model computes with."""
    for raw in dequantized.four_bit:
        weights[raw].copy_(dequantized.through_four_bits(raw, weights[raw]))


def _merge(weights: dict[str, Tensor], onto: Checkpoint, also: dict[str, str], updates: dict[str, Update]) -> None:
    """Put in place of each weight what `merge_adapter` would write."""
    for raw in {**also, **updates}:
        W = onto.tensor(raw)
        merged = torch.cat([block.to(W.dtype) for block in updates.get(raw, Update(raw)).blocks(W)])
        weights[raw].copy_(merged)


def _with_and_without(adapted: PeftModel, prompts: dict[str, dict]) -> tuple[Logits, Logits]:
    with_adapter = _logits(adapted, prompts)
    with adapted.disable_adapter():
        return with_adapter, _logits(adapted, prompts)


def _logits(model: nn.Module, prompts: dict[str, dict]) -> Logits:
    thinking = _thinking(model)
    try:
        return {name: thinking(**inputs).logits[:, -VERIFY_TOKENS:].clone() for name, inputs in prompts.items()}
    except (TypeError, ValueError, AttributeError) as error:
        kind, reason = type(thinking).__name__, first_line(error)
        raise ValueError(f"{kind} does not answer a prompt of text alone ({reason}): merge without verify") from error


def _refuse_chance(model: nn.Module, prompts: dict[str, dict]) -> None:
    first, second = (_logits(model, {"text": prompts["text"]})["text"] for _ in range(2))
    if not torch.equal(first, second):
        kind = type(_thinking(model)).__name__
        raise ValueError(f"{kind} draws as it answers, so that its logits tell nothing: merge without verify")


def _thinking(model: nn.Module) -> nn.Module:
    """The part that answers in text, of a model that also talks; else the model."""
    return getattr(model, "thinker", model)  # PEFT passes it on


def _errors(logits: Logits, expected: Logits) -> dict[str, float]:
    return {name: ((logits[name] - other).norm() / other.norm()).item() for name, other in expected.items()}


def verification_table(verification: Verification) -> Table:
    """The ways to serve, for the terminal."""
    caption = None if verification.no_image is None else f"image prompt: {verification.no_image}"
    table = Table(title="relative difference of the logits to what was trained", caption=caption)
    table.add_column("served")
    table.add_column("text", justify="right")
    table.add_column("image", justify="right")
    for row in verification.rows:
        table.add_row(row.name, f"{row.text:.2e}", "not measured" if row.image is None else f"{row.image:.2e}")
    return table
