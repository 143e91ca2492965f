"""Ask a model the questions of the world and mark its answers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from .world import PERCEPTION, Digits, Sample, make_samples


def encode(processor, samples: list[Sample], answered: bool = True):
    """A batch of chats, padded on the left. With `answered` also `labels`; without it they end where answers begin.

    Labels are -100 everywhere but on the assistant's tokens, which the chat template marks.
    """
    batch = processor.apply_chat_template(
        [sample.messages(answered) for sample in samples],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not answered,
        return_assistant_tokens_mask=answered,
        processor_kwargs={"padding": True, "padding_side": "left"},  # not every tokenizer keeps its side when saved
    )
    if answered:
        answer = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~answer, -100)
    if "pixel_values" not in batch:
        batch.pop("mm_token_type_ids", None)  # text-only models do not know it
    return batch


@torch.no_grad()
def ask(model, processor, samples: list[Sample], batch_size: int = 100) -> list[str]:
    """The model's greedy answers, as text."""
    model.eval()
    texts = []
    for start in range(0, len(samples), batch_size):
        batch = encode(processor, samples[start : start + batch_size], answered=False)
        tokens = model.generate(**batch.to(model.device), do_sample=False)
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return texts


def is_right(sample: Sample, text: str) -> bool:
    """Reasoning is marked by its boxed answer alone, perception by the whole text."""
    if sample.task != "solve":
        return text == sample.answer
    boxed = [re.search(r"\\boxed\{(.*?)\}", t) for t in (text, sample.answer)]
    return boxed[0] is not None and boxed[0][1] == boxed[1][1]


def accuracy(samples: list[Sample], texts: list[str]) -> float:
    """The share of right answers."""
    return sum(map(is_right, samples, texts)) / len(samples)


def exams(split: str, seed: int, size: int, source: Callable[[str], Digits] = Digits) -> dict[str, list[Sample]]:
    """`size` samples each: reasoning over images as trained and longer, perception by task, reasoning over text.

    `source(split)` gives the digits of the images.
    """
    digits, rng = source(split), np.random.default_rng([seed, 2])
    perception = {task: make_samples(size, [task], rng, digits) for task in PERCEPTION}
    return {
        "2-3 operations": make_samples(size, ["solve"], rng, digits, operations=(2, 3)),
        "4-5 operations": make_samples(size, ["solve"], rng, digits, operations=(4, 5)),
        **perception,
        "text reasoning": make_samples(size, ["solve"], rng),
    }


MEASURES = {  # what a table shows, and the head of its column
    "2-3 operations": "2-3 ops",
    "4-5 operations": "4-5 ops",
    "perception": "perception",
    "text reasoning": "text",
}


def examine(model, processor, exams: dict[str, list[Sample]], progress: bool = True) -> dict[str, float]:
    """Accuracy on every exam, and `perception`: the mean over its three tasks."""
    scores = {}
    for name, samples in tqdm(exams.items(), desc="evaluation", unit="exam", leave=False, disable=not progress):
        scores[name] = accuracy(samples, ask(model, processor, samples))
    return scores | {"perception": sum(scores[task] for task in PERCEPTION) / len(PERCEPTION)}
