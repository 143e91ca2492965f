"""An answer as it is trained: its chain of thought ends, something follows it, and no end token is written out."""

from __future__ import annotations

import re

from .bad_sample import BadSample
from .reading import SPECIAL, THOUGHT_END, THOUGHT_START

END = re.compile(
    rf"\s*(?:(?:{SPECIAL.pattern}|<｜end▁of▁sentence｜>)\s*)+$"
)  # the last one is that of R1's distillations
SEVERAL = "several answers: the last alone is trained"
ENDED = "an end token in an answer: taken out, since the chat template sets it"


def as_trained(messages: list[dict]) -> tuple[list[dict], list[str]]:
    """A conversation without end tokens in its answers, and what is to be known of it.

    Raises:
        BadSample: the chain of thought of the last answer does not end, or nothing follows it.
    """
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    cleaned = [_without_end(turn) if turn["role"] == "assistant" else turn for turn in messages]
    said = "".join(part["text"] or "" for part in cleaned[-1]["content"])
    if not said.strip():
        raise BadSample("empty answer", "has a turn of the assistant that says nothing but that it ends")
    *thought, rest = THOUGHT_END.split(said)
    if THOUGHT_START.search(rest):
        told = "has a chain of thought that does not end, as one that was cut"
        raise BadSample("chain of thought without an end", f"{told}: have it written with more tokens, or take it out")
    if thought and not rest.strip():
        told = "has no answer after its chain of thought, as one that was cut"
        raise BadSample("chain of thought without an answer", f"{told}: add the answer, or take the sample out")
    noted = [SEVERAL] * (len(answers) > 1) + [ENDED] * (cleaned != messages)
    return cleaned, noted


def _without_end(turn: dict) -> dict:
    *parts, last = turn["content"]
    return {**turn, "content": [*parts, {**last, "text": END.sub("", last["text"])}]} if last["text"] else turn
