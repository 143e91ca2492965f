"""Batches of a keep set in an order that can be taken up anywhere, read and tokenized while the model trains.

A batch comes in as many parts as it needs for none to be larger than a training batch, so that it takes no more memory.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answers import Sample, append_answers, prompts


@dataclass(frozen=True)
class Part:
    """Questions with their answers, as a model takes them, and what the VLM says of each of the N answer tokens.

    Attributes:
        inputs: of the model.
        answer_mask: [B, T] which of the last T columns hold an answer's tokens.
        top_tokens, top_logprobs: [N, k], in the order of `answer_mask`.
    """

    inputs: dict[str, Tensor]
    answer_mask: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


def read_part(processor: Any, samples: Sequence[Sample]) -> Part:
    """These samples in one part. ValueError if the processor has no chat template."""
    inputs = prompts(processor, [s.image for s in samples], [s.question for s in samples])
    whole, answer_mask = append_answers(inputs, [s.tokens for s in samples], processor.tokenizer.pad_token_id or 0)
    top = torch.cat([s.top_tokens for s in samples]), torch.cat([s.top_logprobs for s in samples])
    return Part(whole, answer_mask, *top)


class Feed:
    """Batch number n of a keep set: the set comes again and again, each time in another order.

    Args:
        keep_set: what it reads, by index.
        processor: of the model; a copy of it is used.
    """

    def __init__(self, keep_set: Sequence[Sample], processor: Any, batch_size: int, seed: int):
        self.keep_set, self.batch_size, self.seed = keep_set, batch_size, seed
        # Training may use the processor at the same time, which tokenizers do not stand.
        self.processor = copy.deepcopy(processor)
        self._ahead: tuple[int, Future[list[Part]]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def batch(self, number: int, tokens: int) -> list[Part]:
        """As it was read ahead, or read now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == number:
            return ahead[1].result()
        return self.read(number, tokens)

    def read_ahead(self, number: int, tokens: int) -> None:
        """Begin to read a batch on another thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._ahead = number, self._thread.submit(self.read, number, tokens)

    def read(self, number: int, tokens: int) -> list[Part]:
        """In parts of at most so many tokens, padding included, or of one sample."""
        samples = [self.keep_set[i] for i in self.indices(number)]
        whole = read_part(self.processor, samples)
        size = max(1, tokens // whole.inputs["input_ids"].shape[1])
        if size >= len(samples):
            return [whole]
        return [read_part(self.processor, samples[i : i + size]) for i in range(0, len(samples), size)]

    def indices(self, number: int) -> list[int]:
        """Which samples are in a batch."""
        size, indices = len(self.keep_set), []
        for place in range(number * self.batch_size, (number + 1) * self.batch_size):
            turn, i = divmod(place, size)
            generator = torch.Generator().manual_seed(mixed(self.seed, turn))
            indices.append(int(torch.randperm(size, generator=generator)[i]))
        return indices

    def __getstate__(self):  # a copy reads by itself
        return {**self.__dict__, "_ahead": None, "_thread": None}


def mixed(*numbers: int) -> int:
    """A seed that depends on all of these."""
    return random.Random(repr(numbers)).getrandbits(63)
