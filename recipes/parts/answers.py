r"""Is the answer of a response the known one?

    is_correct(r"<think>2 m + 3 m</think> \\boxed{500 cm}", "5 m")               # True
    is_correct(r"… \\boxed{12}", "B", question="… (A) 10 (B) 12")                # True
    is_correct("The answer is **12**.", "… #### 12")                             # True

Both are read by reading.py and compared by equality.py, in a process of its own: its timeouts would be signals, which
only a main thread may set, and a comparison need not end. What is not decided in SECONDS counts as wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from .options import read_options
from .reading import extract_boxed, known_answer, read_answer

SECONDS = 5.0
LONGEST = 2000  # characters; a longer answer is right if its text is the known one's
NEEDED = ("math_verify", "num2words", "pint", "sympy")  # by the other process, which would end, and all would be wrong
for package in NEEDED:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def well_formed(response: str) -> bool:
    r"""One non-empty <think>…</think> in front, and after it an answer in a \boxed{…}, as the paper asks for."""
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return False
    match = re.fullmatch(r"\s*<think>(.*)</think>(.*)", response, re.DOTALL)
    return bool(match and match[1].strip() and extract_boxed(match[2]))


def is_correct(response: str, gold: str, *, question: str = "") -> bool:
    """Whether what a response answers is what the gold answer says.

    Args:
        gold: as the data set writes it: alone, boxed, tagged, or with its chain in front.
        question: where the options stand, if there are some: then an option's letter and its text are one answer.
    """
    reading = read_answer(response)
    return reading is not None and is_known(reading[0], gold, question)


def is_known(answer: str, gold: str, question: str) -> bool:
    """`is_correct` of the answer that a response was read as."""
    known = known_answer(gold)
    if not answer or not known:
        return False
    if answer == known:
        return True
    if max(len(answer), len(known)) > LONGEST:
        answer, known = (re.sub(r"[\s,$]", "", text).rstrip(".;") for text in (answer, known))
        return answer == known
    return _judge(answer, known, read_options(question))


class Judge:
    """`same_answer` in another process, which is killed and replaced when it takes too long. For any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def __call__(self, answer: str, gold: str, options: dict[str, str]) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.equality"],
                    cwd=Path(__file__).parents[1],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
                self.process.stdout.readline()  # it has imported sympy
            timer = threading.Timer(SECONDS, self.process.kill)
            timer.start()
            try:
                self.process.stdin.write(json.dumps([answer, gold, options]) + "\n")
                self.process.stdin.flush()
                return self.process.stdout.readline() == "true\n"
            except OSError:  # it died before it could read
                return False
            finally:
                timer.cancel()


_judge = Judge()
