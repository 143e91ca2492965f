"""The frozen scorer: the answer of a response, read by rule and compared as answers.py does. No judge model.

That one scorer judges all models under comparison matters more than which: Qwen2.5-VL-7B has 60.7, 63.8 or about 68 on
MathVista by the judge (ding523/Curr_REFT#1), and the gain that DRIFT publishes there is +1.2.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from .answers import is_correct
from .reading import final_answer

RULES = 2  # counts up with every change of the reading or comparing; scores of different rules are not to be compared
FILES = ("answers", "reading", "options", "plain", "equality", "units")


def scorer() -> dict:
    """What decides; written into each result."""
    rules = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in FILES)).hexdigest()
    return {"rules": RULES, "files": rules[:16], **{name: version(name) for name in ("math-verify", "pint", "sympy")}}


def mark(response: str, gold: str, question: str) -> tuple[bool, bool]:
    """Whether a response is correct, and whether it is unfinished: without a final answer, and so wrong."""
    if final_answer(response) is None:
        return False, True
    return is_correct(response, gold, question=question), False
