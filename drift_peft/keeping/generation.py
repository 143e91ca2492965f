"""A model that answers: loaded as it lies on disk, and asked for what it finds likeliest; what stands in its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint, assumed_quantization
from .answers import accepted_inputs


def load_model(checkpoint: Checkpoint, load_in_4bit: bool) -> nn.Module:
    """On the GPU if there is one, and in evaluation mode; its language model's projections in NF4, or all as it is."""
    origin = checkpoint.origin
    options = {"revision": origin["revision"], "dtype": "auto", "trust_remote_code": False}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    if load_in_4bit:
        options["quantization_config"] = assumed_quantization(checkpoint)
    return checkpoint.auto_class.from_pretrained(origin["id"], **options).eval()


def greedy(
    model: nn.Module, tokenizer: Any, inputs: dict[str, Tensor], max_new_tokens: int, suppressed: Sequence[int] = ()
) -> list[Tensor]:
    """The likeliest token each time, whatever the model's own settings say of sampling and repetition.

    Args:
        inputs: prompts, padded on the left.
        suppressed: tokens that no answer may hold.

    Returns:
        Of each prompt the tokens of its answer, with the one that ends it where it was ended.
    """
    model = getattr(model, "get_base_model", lambda: model)()  # inside PEFT's wrapper, adapted as it is
    own = model.generation_config
    # What generate() is given, it fills up from here.
    model.generation_config = greedy_settings(own, tokenizer, max_new_tokens, suppressed)
    try:
        generated = model.generate(**accepted_inputs(model, inputs))[:, inputs["input_ids"].shape[1] :]
    finally:
        model.generation_config = own
    ended = torch.isin(generated, torch.tensor(ends_of(own, tokenizer)).to(generated))
    # Up to the first token that ends it, and with that one.
    return [row[: int(end.int().argmax()) + 1] if end.any() else row for row, end in zip(generated, ended, strict=True)]


def greedy_settings(own: Any, tokenizer: Any, max_new_tokens: int, suppressed: Sequence[int] = ()) -> Any:
    """A GenerationConfig that takes the likeliest token each time, with the special tokens of the model's own."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends_of(own, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[*suppressed] or None,
    )


def ends_of(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as the model's generation config has them, or else the tokenizer."""
    own = generation_config.eos_token_id
    ends = own if own is not None else tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [*ends]


def machine() -> dict:
    """What the last bits of an answer depend on, beside the model and what it is asked."""
    return {"gpu": torch.cuda.is_available(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def refuse_infinite(values: Tensor, model: str) -> None:
    """ValueError if what the model says is NaN or infinite."""
    if not values.isfinite().all():
        raise ValueError(f"{model} gives NaN or infinite logits: load it in bfloat16 or float32")


def refuse_offloaded(model: nn.Module, name: str, asked: str) -> None:
    """ValueError if a part of the model lies outside the GPU, where only its own forward pass brings it in."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{asked} needs all weights of {name} in one place, and the GPU has no room for them: take a larger one, "
            "or hide it (CUDA_VISIBLE_DEVICES=) and let the CPU compute"
        )


@contextlib.contextmanager
def with_room(asked: str, in_4bit_helps: bool) -> Iterator[None]:
    """ValueError if the GPU has no room for what is asked at a time, such as "8 questions".

    `in_4bit_helps`: the caller could load the model with load_in_4bit, and does not.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        or_in_4bit = ", or load_in_4bit=True (--load-in-4bit)" if in_4bit_helps else ""
        raise ValueError(
            f"the GPU has no room for {asked} at a time: pass a smaller batch_size (--batch-size){or_in_4bit}"
        ) from error


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
