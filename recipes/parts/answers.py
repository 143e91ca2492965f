r"""Is the answer of a response the known one?

    is_correct(r"<think>2 m + 3 m</think> \\boxed{500 cm}", "5 m")               # True
    is_correct(r"… \\boxed{12}", "B", question="… (A) 10 (B) 12")                # True
    is_correct("The answer is **12**.", "… #### 12")                             # True

Both are read by reading.py and compared by equality.py, in a process of its own: its timeouts would be signals, which
only a main thread may set, and a comparison need not end. What is not decided in SECONDS counts as wrong.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from .options import read_options
from .reading import extract_boxed, known_answer, read_answer

SECONDS = 5.0  # of a processor's time, so that a busy machine decides alike
OUT_OF_TIME = -signal.SIGPROF if hasattr(signal, "SIGPROF") else None  # how equality.py ends after SECONDS
PATIENCE = 600.0 if OUT_OF_TIME else 60.0  # in all; nothing else ends it on Windows, which counts no such time
LONGEST = 2000  # characters; a longer answer is right if its text is the known one's
NEEDED = ("math_verify", "num2words", "pint", "sympy")  # by the other process
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
    return reading is not None and bool(is_known(reading[0], gold, question))


def is_known(answer: str, gold: str, question: str) -> bool | None:
    """`is_correct` of the answer that a response was read as; None if that is not decided in time."""
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
    """`same_answer` in another process, which is replaced when it takes too long. For any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def __call__(self, answer: str, gold: str, options: dict[str, str]) -> bool | None:
        """None if it is not decided in time."""
        question = json.dumps([SECONDS, answer, gold, options]) + "\n"
        with self.lock:
            for _ in range(2):  # a process may have died of something else than this question
                process, self.process = self.process or self._started(), None  # kept again if it replies
                late = threading.Event()
                timer = threading.Timer(PATIENCE, lambda process=process, late=late: (late.set(), process.kill()))
                try:
                    timer.start()
                    process.stdin.write(question)
                    process.stdin.flush()
                    reply = process.stdout.readline()
                except OSError:
                    reply = ""
                except BaseException:  # Ctrl-C: nobody will read the reply
                    process.kill()
                    raise
                finally:
                    timer.cancel()
                if reply.endswith("\n"):
                    self.process = process
                    return json.loads(reply)
                with suppress(OSError):  # what it did not read
                    process.stdin.close()
                process.stdout.close()
                if process.wait() == OUT_OF_TIME or late.is_set():
                    break
        return None

    def _started(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.equality"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        if process.stdout.readline() != "ready\n":  # it has imported sympy
            raise ChildProcessError(
                f"the process that compares answers ended with {process.wait()} before it was ready: "
                "its own message, if it wrote one, is above"
            )
        return process


_judge = Judge()
if hasattr(os, "register_at_fork"):  # two that asked one process would read each other's replies
    os.register_at_fork(after_in_child=_judge.__init__)
