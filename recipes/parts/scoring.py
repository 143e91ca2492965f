"""The frozen scorer: the answer of a response, read by rule and compared as answers.py does. No judge model.

That one scorer judges all models under comparison matters more than which: Qwen2.5-VL-7B has 60.7, 63.8 or about 68 on
MathVista by the judge (ding523/Curr_REFT#1), and the gain that DRIFT publishes there is +1.2.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from .answers import is_known
from .reading import UNDECIDED, UNFINISHED, read_answer

VERSION = 6  # counts up with every change of the reading or comparing; scores of different rules are not to be compared
FILES = ("scoring", "answers", "reading", "options", "plain", "numerals", "equality", "units")


def scorer() -> dict:
    """What decides; written into each result."""
    rules = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in FILES)).hexdigest()
    return {"rules": VERSION, "files": rules[:16], **{name: version(name) for name in ("math-verify", "pint", "sympy")}}


def mark(response: str, gold: str, question: str, finish_reason: str | None = None) -> tuple[bool, str]:
    """Whether a response is correct, and by which rule it was read.

    UNFINISHED is wrong, since it has no final answer. So is UNDECIDED, whose comparison took too long.

    Args:
        finish_reason: "length" of a response that was cut, which is unfinished unless its answer is right for sure.
    """
    reading = read_answer(response)
    if reading is None:
        return False, UNFINISHED
    answer, read_by = reading
    correct = is_known(answer, gold, question)
    if finish_reason == "length" and not (correct and _stands(response, answer, read_by)):
        return False, UNFINISHED
    return (False, UNDECIDED) if correct is None else (correct, read_by)


def _stands(response: str, answer: str, read_by: str) -> bool:
    """Whether more words could not change the answer of a response, as they do where `12` is what is left of `125`."""
    at_the_end = response.rstrip(" *$.").endswith(answer.rstrip(" *$."))
    return read_by in ("boxed", "tag") or not at_the_end
