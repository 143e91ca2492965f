"""An answer as it is trained: it says something beside a chain of thought, and no end token is written out."""

from __future__ import annotations

import re
from collections.abc import Collection

from .bad_sample import BadSample
from .layouts import last_answer
from .reading import THOUGHT_END, THOUGHT_START, read_answer

WRITTEN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>")  # the last: R1's
ENDS = (*WRITTEN, "<|end|>", "<|return|>", "</s>", "<eos>", "<pad>")  # the last ones may be HTML, or what is meant
TAG = re.compile(f"{THOUGHT_START.pattern}|{THOUGHT_END.pattern.removeprefix('(?i)')}")
SEVERAL = "several answers: the last alone is trained"
ENDED = "an end token in an answer: taken out, since the chat template sets it"


def special_tokens(processor) -> set[str]:
    """Those that the tokenizer of a base never takes for text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {*tokenizer.all_special_tokens}


def as_trained(messages: list[dict], special: Collection[str] = ()) -> tuple[list[dict], list[str]]:
    """A conversation without end tokens in its answers, and what is to be known of it.

    Args:
        special: the base's special tokens, if it is known: its end tokens are taken out wherever an answer ends, others
            only where they follow the answer at once, as no text does that is about them.

    Raises:
        BadSample: the last answer is nothing but a chain of thought, whether that ends or not.
    """
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    ends = [token for token in ENDS if token in special]
    cleaned = [_without_end(turn, ends) if turn["role"] == "assistant" else turn for turn in messages]
    answer = last_answer(cleaned)
    if not answer.strip():
        raise BadSample("empty answer", "has a turn of the assistant that says nothing but that it ends")
    rest = THOUGHT_END.split(answer)[-1].strip()
    if THOUGHT_START.match(rest) and not _says_beside_chains(answer):
        told = "has a chain of thought that does not end, as one that was cut"
        raise BadSample("chain of thought without an end", f"{told}: have it written with more tokens, or take it out")
    if not rest and not _says_beside_chains(answer) and read_answer(answer) is None:
        told = "has no answer after its chain of thought, as one that was cut"
        raise BadSample("chain of thought without an answer", f"{told}: add the answer, or take the sample out")
    noted = [SEVERAL] * (len(answers) > 1) + [ENDED] * (cleaned != messages)
    return cleaned, noted


def _says_beside_chains(answer: str) -> bool:
    """Whether something stands before a chain of thought. Where its start is in the prompt, as R1's, its end is the
    first tag, in a line of its own; another end without a start is what the text is about."""
    place, is_inside = 0, False
    for tag in TAG.finditer(answer):
        text, starts = answer[place : tag.start()], THOUGHT_START.match(tag[0]) is not None
        is_chain = is_inside or (not starts and place == 0 and text.rstrip(" \t").endswith("\n"))
        if text.strip() and not is_chain:
            return True
        place, is_inside = tag.end(), starts
    return False


def _without_end(turn: dict, ends: list[str]) -> dict:
    *parts, last = turn["content"]
    text = last["text"] or ""
    place = after_space = _before_space(text, len(text))
    taken = []
    while token := next((token for token in (*ends, *WRITTEN) if text.endswith(token, 0, place)), None):
        taken.append(token)
        after_space = place - len(token)
        place = _before_space(text, after_space)
    if not taken or (after_space != place and not {*taken} <= {*ends}):
        return turn
    return {**turn, "content": [*parts, {**last, "text": text[:place]}]}


def _before_space(text: str, place: int) -> int:
    while place and text[place - 1].isspace():
        place -= 1
    return place
