"""What one tokenizer's tokens are to another: an expert's answers and probabilities in the tokens of the VLM.

Two models of one family share nearly all tokens, but seldom the special ones: to DeepSeek-R1-Distill-Qwen `</think>` is
one token, to Qwen2.5-VL three. A token without a counterpart is spelled in others. The first of these takes over its
probability, and the rest follow with certainty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LEAST_SHARED = 0.9  # of the expert's tokens; below, one cannot spell what the other says
IMPOSSIBLE = -100.0  # log probability of what cannot be: e to this power is 0 in fp32, and 0 times it is 0


class Spelling:
    """Tokens of an expert as tokens of a base.

    Args:
        expert, base: their tokenizers.
        ends: the expert's tokens that end an answer. An end token that also ends the base's answers is kept; any
            other becomes the base's first end token.
        base_ends: the base's tokens that end an answer, the one of its chats first.
        rows: how many tokens the base gives a probability.

    Raises:
        ValueError: the two have too few tokens in common, or the base's tokenizer names no token that ends an answer.
    """

    def __init__(self, expert: Any, base: Any, ends: Iterable[int], base_ends: Sequence[int], rows: int):
        self.base, self.rows = base, rows
        theirs, ours = expert.get_vocab(), base.get_vocab()
        if not base_ends:
            raise ValueError("the base's tokenizer names no token that ends an answer: set its eos_token")
        shared = sum(token in ours for token in theirs) / len(theirs)
        if shared < LEAST_SHARED:
            raise ValueError(
                f"only {shared:.0%} of the expert's tokens are tokens of the base too, so what it says cannot be told "
                "there: gate with an expert of the base's own family"
            )
        alike = {row: [ours[token]] for token, row in theirs.items() if token in ours}
        others = {row: token for token, row in theirs.items() if token not in ours}
        spelled = {row: self.spell(expert.convert_tokens_to_string([token])) for row, token in others.items()}
        self.tokens = {**alike, **spelled}
        for end in ends:
            if (self.tokens.get(end) or [None])[0] not in base_ends:
                self.tokens[end] = [base_ends[0]]

    def spell(self, text: str) -> list[int]:
        """A text in the base's tokens."""
        return self.base.encode(text, add_special_tokens=False)

    @cached_property
    def first(self) -> Tensor:
        """[n] the first token of each of the expert's, -1 of those that are none or have no spelling."""
        first = torch.full((max(self.tokens) + 1,), -1)
        for row, tokens in self.tokens.items():
            first[row] = tokens[0] if tokens else -1
        return first

    def answer(self, tokens: Sequence[int], logits: Tensor, k: int, opened: str = "") -> dict[str, Tensor]:
        """An answer as the base would say it: `tokens` [T'], `top_tokens` and `top_logprobs` [T', k].

        Args:
            tokens: the expert's, T of them.
            logits: [T, n] of the expert in the place of each.
            opened: what was laid into the expert's mouth, which it then goes on from.
        """
        first = self.first.to(logits.device)
        probabilities = torch.softmax(logits.float(), -1)[:, : len(first)]
        probabilities, known = probabilities[:, first[: probabilities.shape[1]] >= 0], first[: probabilities.shape[1]]
        p = probabilities.new_zeros(len(probabilities), self.rows).index_add_(1, known[known >= 0], probabilities)
        top = p.topk(k)
        rows = [_certain(token, k) for token in self.spell(opened)]
        for token, *place in zip(tokens, top.indices.cpu(), top.values.log().clamp_min(IMPOSSIBLE).cpu(), strict=True):
            if here := self.tokens.get(token):
                rows += [(here[0], *place), *(_certain(rest, k) for rest in here[1:])]
        spelled, top_tokens, top_logprobs = zip(*rows, strict=True)
        return {
            "tokens": torch.tensor(spelled),
            "top_tokens": torch.stack(top_tokens),
            "top_logprobs": torch.stack(top_logprobs),
        }


def _certain(token: int, k: int) -> tuple[int, Tensor, Tensor]:
    others = torch.tensor([other for other in range(k + 1) if other != token][: k - 1], dtype=torch.long)
    logprobs = torch.full((k,), IMPOSSIBLE, dtype=torch.float32)
    logprobs[0] = 0.0
    return token, torch.cat([torch.tensor([token]), others]), logprobs
