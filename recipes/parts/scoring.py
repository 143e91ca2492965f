r"""The frozen scorer: finds the final answer of a response by rule, and compares it as answers.py does. No judge model.

That one scorer judges all models under comparison matters more than which: Qwen2.5-VL-7B has 60.7, 63.8 or about 68 on
MathVista by the judge (ding523/Curr_REFT#1), and the gain that DRIFT publishes there is +1.2.
"""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import version
from pathlib import Path

from . import answers
from .answers import extract_boxed, is_correct

RULES = 1  # counts up with every change of final_answer(); scores of different rules are not to be compared
SHORT = 60  # characters that an answer without any mark may have
SAID = re.compile(r"(?i)\b(?:answer|option|choice)[\s*_]*(?:\bis\b|:)[\s*_]*:?(?P<said>.+)")
MARKS = re.compile(r"^[\s*_#`>-]+|[\s*_`]+$")  # of Markdown


def scorer() -> dict:
    """What decides; written into each result."""
    rules = hashlib.sha256(Path(answers.__file__).read_bytes()).hexdigest()
    return {"rules": RULES, "answers.py": rules[:16], **{name: version(name) for name in ("math-verify", "sympy")}}


def final_answer(response: str) -> str | None:
    r"""What a response answers; None if it was cut, or answers nothing that a rule finds.

    In this order: after the thinking, the last \boxed{…}, an <answer>…</answer> (which the tasks of lmms-eval ask for),
    the last line that says `answer: …` or `answer is …`, or all of it if it is one short line; then a \boxed{…} within
    the thinking.
    """
    thought, _, rest = response.rpartition("</think>")
    if "<think>" in rest or (r"\boxed{" in rest and not extract_boxed(rest)):
        return None
    tagged = re.findall(r"<answer>(.*?)</answer>", rest, re.DOTALL)
    lines = [line for line in (MARKS.sub("", line) for line in rest.splitlines()) if line]
    said = [found["said"] for line in lines if (found := SAID.search(line))]
    alone = lines[0] if len(lines) == 1 and len(lines[0]) <= SHORT else None
    found = (extract_boxed(rest), tagged and tagged[-1].strip(), said and MARKS.sub("", said[-1]), alone)
    return next((answer for answer in found if answer), None) or extract_boxed(thought)


def mark(response: str, gold: str, question: str) -> tuple[bool, bool]:
    """Whether a response is correct, and whether it is unfinished: without a final answer, and so wrong."""
    answer = final_answer(response)
    if answer is None:
        return False, True
    return is_correct(rf"\boxed{{{answer}}}", gold, question=question), False
