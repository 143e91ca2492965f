"""Is the boxed answer of a response the known one? Choices, numbers, units, percent, sets and formulas.

    is_correct(r"<think>2 m + 3 m</think> \\boxed{500 cm}", "5 m")               # True
    is_correct(r"… \\boxed{12}", "B", question="… (A) 10 (B) 12")                # True

What is equal as text, or as a choice, is decided here; the rest by math-verify, in a process of its own, because its
timeouts are signals, which only a main thread may set. What is not decided in SECONDS counts as wrong. It errs on the
side of wrong: 3.14 is not π, and 5 cm is not 5 m.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter

SECONDS = 5.0
LETTER = re.compile(r"\(?(?P<letter>[A-Ja-j])(?:\)|[.:](?=\s|$)|$)\s*(?P<text>.*)", re.DOTALL)
SIGNS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
         "≥": r"\ge ", "°": r"^\circ", "²": "^2", "³": "^3"}  # fmt: skip
WRITTEN = (  # LaTeX that changes how an answer looks, not what it says
    (r"\\(?:left|right|displaystyle|,|;|!|\(|\)|\[|\])|\$|\\(?=[$%])", ""),
    (r"\\ |~|\\quad\b", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?", " degrees "),
    (r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}"),
    (r"(?<=\d)\s(?=\d{3}(?!\d))", ""),  # 1 000
    (r"(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"),  # 2 1/2, which math-verify reads as 2·1/2
    (r"(\d)[eE]([+-]?\d+)", r"\1\\times 10^{\2}"),  # 2e3, which it reads as 2·e·3
    (r"\s+", " "),
)
UNIT = re.compile(
    r"(?P<value>.*[\d)}.]|.*\\pi)(?P<space>\s*)"
    r"(?P<unit>(?:[A-Za-zµ]+(?:\^\{?-?\d\}?)?(?:\s*/\s*|\s+|\s*$))+)",
    re.DOTALL,
)


def extract_boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, braces inside it included; None if there is none, or the text ends within it."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    first, depth = text.index("{", start) + 1, 1
    for brace in re.finditer(r"\\.|[{}]", text[first:], re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[first : first + brace.start()].strip()
    return None


def well_formed(response: str) -> bool:
    r"""One non-empty <think>…</think> in front, and after it an answer in a \boxed{…}, as the paper asks for."""
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return False
    found = re.fullmatch(r"\s*<think>(.*)</think>(.*)", response, re.DOTALL)
    return bool(found and found[1].strip() and extract_boxed(found[2]))


def is_correct(response: str, gold: str, *, question: str = "") -> bool:
    """Whether the last boxed answer of a response is the gold answer, which may be boxed too.

    Args:
        question: where the options stand, if there are some: then an option's letter and its text are one answer.
    """
    answer = extract_boxed(response)
    if not answer:
        return False
    gold = extract_boxed(gold) or gold
    answer, gold = _plain(answer), _plain(gold)
    if _same_text(answer, gold):
        return True
    options = read_options(question)
    given, known = _choice(answer), _choice(gold)
    if known and (known[0] in options or not options):  # the gold answer is a letter, perhaps with its option's text
        letter, text = known
        if given:
            return given[0] == letter
        return any(_equal(answer, wanted) for wanted in (text, options.get(letter)) if wanted)
    if given and given[0] in options:
        return _equal(options[given[0]], gold)
    return _equal(answer, gold)


def read_options(question: str) -> dict[str, str]:
    """Letter -> text of the options A, B, … that a question ends with; {} if there are no two."""
    marks = [*re.finditer(r"(?:^|(?<=\s))\(?([A-J])[).:](?=\s|\d|\\|\$|-)\s*", question)]
    starts = [i for i, mark in enumerate(marks) if mark[1] == "A"]
    marks = marks[starts[-1] :] if starts else []
    options: dict[str, str] = {}
    for i, mark in enumerate(marks):
        if mark[1] != "ABCDEFGHIJ"[i]:
            break
        end = marks[i + 1].start() if i + 1 < len(marks) else len(question)
        options[mark[1]] = _plain(question[mark.end() : end].strip().partition("\n")[0])
    return options if len(options) > 1 else {}


def _plain(text: str) -> str:
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    for pattern, written in WRITTEN:
        text = re.sub(pattern, written, text)
    text = re.sub(r"(?i)^\s*(?:the )?(?:final )?(?:answer|option|choice)(?: is)?:?\s+(?=\S)", "", text)
    return text.strip().rstrip(".").strip()


def _same_text(one: str, other: str) -> bool:
    one, other = (re.sub(r"\s*([,;:=+*/^()\[\]{}<>-])\s*", r"\1", text).casefold() for text in (one, other))
    return one == other or (_letters(one) is not None and _letters(one) == _letters(other))


def _letters(text: str) -> frozenset[str] | None:
    """The choices of `a, c` or `A and C`; None if this is something else."""
    parts = re.split(r"\s*(?:,|&|;|\band\b)\s*", text)
    letters = [found["letter"] for part in parts if (found := LETTER.fullmatch(part)) and not found["text"]]
    return frozenset(letters) if len(letters) == len(parts) > 1 else None


def _choice(text: str) -> tuple[str, str] | None:
    found = LETTER.fullmatch(text)
    return (found["letter"].upper(), found["text"]) if found else None


def _equal(answer: str, gold: str) -> bool:
    return _same_text(answer, gold) or _judge(answer, gold)


class Judge:
    """`equal_values` in another process, which is killed and replaced when it takes too long. For any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def __call__(self, answer: str, gold: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
                self.process.stdout.readline()  # it has imported sympy
            timer = threading.Timer(SECONDS, self.process.kill)
            timer.start()
            try:
                self.process.stdin.write(json.dumps([answer, gold]) + "\n")
                self.process.stdin.flush()
                return self.process.stdout.readline() == "true\n"
            except OSError:  # it died before it could read
                return False
            finally:
                timer.cancel()


_judge = Judge()


def equal_values(answer: str, gold: str) -> bool:
    """Whether two plain texts are equal as mathematics, with the same unit if both have one."""
    (answer, unit), (gold, known) = _split_unit(answer), _split_unit(gold)
    if unit and known and unit[0] != known[0]:
        return False
    if _only_text(answer) or _only_text(gold):
        return _same_text(answer, gold)
    if gold.startswith("(") and "," in gold and answer[:1] not in ("(", "["):
        answer = f"({answer})"  # a point is no set: the order counts
    values = [_parse(text) for text in (answer, gold)]
    if not all(values):
        return False
    from math_verify import verify

    if unit and known and unit[1] != known[1]:
        from sympy import Basic

        values = [[v * u[1] for v in vs if isinstance(v, Basic)] for vs, u in zip(values, (unit, known), strict=True)]
    return verify(values[1], values[0], timeout_seconds=None)


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # The whole of it or nothing: the default would be content with some number in it.
    return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def _split_unit(text: str) -> tuple[str, tuple[Counter, object] | None]:
    """`5 cm^2` -> ("5", (dimensions, factor to the canonical unit)); another word is a dimension of its own."""
    found = UNIT.fullmatch(text)
    if not found:
        return text, None
    words = found["unit"].split()
    if len(words[0]) == 1 and not found["space"]:
        return text, None  # 5x
    dimensions, factor = _read_unit(" ".join(words))
    return (found["value"], (dimensions, factor)) if dimensions else (text, None)


def _read_unit(text: str) -> tuple[Counter, object]:
    from sympy import Integer
    from sympy.physics import units
    from sympy.physics.units.quantities import PhysicalConstant

    text = re.sub(r"\b(?:square|sq)\s+(\w+)", r"\1^2", re.sub(r"\bcubic\s+(\w+)", r"\1^3", text))
    text = re.sub(r"\s+per\s+", "/", text)
    dimensions, factor, sign = Counter(), Integer(1), 1
    for name, power, slash in re.findall(r"([A-Za-zµ]+)(?:\^\{?(-?\d)\}?)?\s*(/?)", text):
        power = sign * int(power or 1)
        sign = -1 if slash else sign
        quantity = getattr(units, name, None) or getattr(units, name.lower(), None)
        if not isinstance(quantity, units.Quantity) or isinstance(quantity, PhysicalConstant):
            if len(name) == 1:
                return Counter(), factor  # a variable
            dimensions[name.lower().rstrip("s")] += power
            continue
        factor *= quantity.scale_factor**power
        for dimension, exponent in (
            units.systems.SI.get_dimension_system().get_dimensional_dependencies(quantity.dimension).items()
            or {quantity.dimension: 1}.items()
        ):
            dimensions[str(dimension.name)] += exponent * power
    return dimensions, factor


def _only_text(text: str) -> bool:
    """Words, or a time of day: math-verify would multiply letters and divide hours by minutes."""
    without = re.sub(r"\\[A-Za-z]+|\b(?:or|and)\b", " ", text)
    without = re.sub(r"[A-Za-z]{1,4}(?=\s*=[^=]*$)", " ", without, count=1)  # AB = 5
    return bool(re.search(r"[A-Za-z]{2,}|\b\d{1,2}:\d\d\b", without))


if __name__ == "__main__":
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the one who asks; this ends without a traceback

    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # the one who asks keeps the time
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal_values(*json.loads(line))), flush=True)
