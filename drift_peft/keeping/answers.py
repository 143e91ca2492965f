"""Questions, about images or in text alone, and their answers as a model's inputs, and what it says of each answer
token.

The same for whoever makes a keep set, trains with one or measures with one, so that a model that has not changed is at
a distance of zero.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

if TYPE_CHECKING:  # pillow is needed by who keeps, and by nobody else
    from PIL.Image import Image

OPENED = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Sample:
    """One question about one image, and the VLM's own answer; or a prompt in text, and the expert's.

    Attributes:
        image, question, kind: what was asked; `kind` is what sort of question it is, such as "count". A prompt in text
            has no image.
        answer: in words.
        tokens: [T] the answer, with the token that ends it where it was ended.
        top_tokens: [T, k] the k most likely tokens in the place of each.
        top_logprobs: [T, k] their log probabilities, in fp32, in descending order.
    """

    image: Image | None
    question: str
    kind: str
    answer: str
    tokens: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


def prompts(processor: Any, images: Sequence[Image | None], questions: Sequence[str]) -> dict[str, Tensor]:
    """What the model takes for these questions up to where its answers begin, padded on the left. Either all of them
    are about an image, or none is.

    Raises:
        ValueError: the processor has no chat template.
    """
    refuse_without_chat_template(processor, type(processor).__name__)
    shown = [[] if image is None else [{"type": "image"}] for image in images]
    turns = [
        [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]
        for picture, question in zip(shown, questions, strict=True)
    ]
    pictures = {"images": [[image] for image in images]} if any(shown) else {}
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    pictures |= as_templates_are_read(processor, texts[0])
    return dict(processor(text=texts, **pictures, padding=True, padding_side="left", return_tensors="pt"))


def image_mode(processor: Any) -> str:
    """What a processor takes: RGB, or L where it normalizes a single channel."""
    mean = getattr(processor.image_processor, "image_mean", None)
    return "L" if isinstance(mean, (list, tuple)) and len(mean) == 1 else "RGB"


def refuse_without_chat_template(words: Any, name: str) -> None:
    """ValueError if a processor or a tokenizer has no chat template; `name` is what it is called."""
    if getattr(words, "chat_template", None) is None:
        raise ValueError(f"{name} has no chat template, which says where an answer begins: give an instruct model")


def as_templates_are_read(processor: Any, text: str) -> dict[str, bool]:
    """What a processor is told beside a text of its chat template, as its own apply_chat_template tells it: where the
    template has written the token that begins a text, such as Gemma's, the tokenizer is not to write it again."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}


def think_prefix(text: str) -> str:
    """The opening think tag that a chat template puts at the end of a prompt; empty if none."""
    match = OPENED.search(text)
    return match[0] if match else ""


def append_answers(inputs: dict[str, Tensor], answers: Sequence[Tensor], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """The prompts with their answers behind them, all ending in the same column, and [B, T] which of the last T columns
    hold an answer's tokens. T is the length of the longest answer."""
    kept = inputs["attention_mask"].bool()

    def joined(values: Tensor, answers: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([row[held], answer.to(row)]) for row, held, answer in zip(values, kept, answers, strict=True)]

    rows = joined(inputs["input_ids"], answers)
    whole = {"input_ids": _padded(rows, pad), "attention_mask": _padded([torch.ones_like(row) for row in rows])}
    for name, value in inputs.items():
        if name.endswith("token_type_ids"):  # of each token, in which text has 0
            whole[name] = _padded(joined(value, [torch.zeros_like(answer) for answer in answers]))
        elif name == "cross_attention_mask":  # of each token the images that it sees; an answer sees its prompt's
            seen = [row[-1:].expand(len(answer), *row.shape[1:]) for row, answer in zip(value, answers, strict=True)]
            whole[name] = _padded(joined(value, seen))
        else:
            whole.setdefault(name, value)
    return whole, _padded([torch.ones_like(answer, dtype=torch.bool) for answer in answers])


def to_model_device(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """On the model's device, images in its dtype."""
    return BatchFeature(inputs).to(model.device, model.dtype).data


def accepted_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that the model knows; a processor may say more, such as Gemma 4's of its images' sizes."""
    while isinstance(model, (PeftModel, BaseTuner)):  # whose forward takes anything
        model = model.get_base_model() if isinstance(model, PeftModel) else model.model
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def answer_logits(model: nn.Module, inputs: dict[str, Tensor], length: int) -> Tensor:
    """[B, T, vocabulary] logits in the place of each of the last T tokens, given those before it."""
    # transformers makes a slice of a number, and on a CPU torch copies a frozen lm_head for each sample of a slice.
    last = torch.arange(-length - 1, 0) if inputs["input_ids"].device.type == "cpu" else length + 1
    logits = getattr(model(**accepted_inputs(model, inputs), logits_to_keep=last, use_cache=False), "logits", None)
    if logits is None:
        raise RuntimeError(
            f"{type(model).__name__} gives no logits: take the model with its head, such as one of "
            "AutoModelForImageTextToText"
        )
    return logits[:, -length - 1 : -1]  # some models know no logits_to_keep, and give all of them


def _padded(rows: list[Tensor], value: int = 0) -> Tensor:
    """[B, T] on the left."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
