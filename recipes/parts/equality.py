r"""Are two answers the same? Choices, numbers, units, percent, sets, points and formulas.

What is equal as text, or as a choice, is decided here, units by pint, the rest by math-verify. It errs on the side of
wrong: 3.14 is not π, 5 cm is not 5 m, and `5 or more` is not 5. This runs in the process of answers.Judge, since a
comparison may not end.
"""

from __future__ import annotations

import json
import re
import sys
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import product

from .options import choice, choices, named, parts
from .plain import closing, plain
from .reading import readings
from .units import Unit, split_unit, sum_of_units

DIGITS = 300  # of a number beyond which no mathematics is done with it
PRICE = r"(?:\\?\$\s*)?\d+(?:[.,]\d+)*"
RANGE = re.compile(rf"{PRICE}(?:\s*-\s*{PRICE})+")  # or a score, a season, a telephone number
ARTICLE = re.compile(r"(?i)^(?:an?|the)\s+(?=\S)")
SYMBOL = r"(?:\\?[A-Za-z]+'*|\\(?:overline|widehat|vec|hat|bar|overrightarrow|mathbf)\s*\{\s*[A-Za-z]+\s*\})"
INDEX = r"(?:\s*_\s*(?:\{[^{}]*\}|\w))?"
LABEL = re.compile(
    rf"^(?P<label>(?:m\s*)?(?:\\(?:angle|triangle|sin|cos|tan|cot)\s*)?{SYMBOL}{INDEX}(?:\s*\(\s*[A-Za-z\\|, ]+\s*\))?|"
    rf"\|\s*{SYMBOL}{INDEX}\s*\||(?:[A-Za-z][A-Za-z'-]*\s+){{1,5}}(?:\\(?:angle|triangle)\s*)?[A-Za-z][A-Za-z'-]*|\\overset\s*\{{[^{{}}]*\}}\s*\{{[A-Z]+\}}|\\frac\s*\{{d[a-z]\}}\s*\{{d[a-z]\}})"
    r"\s*(?:=|\\approx\b|\\in\b|\\to\b|:)\s*(?P<value>[^=].*)$",
    re.DOTALL,
)
POINT = re.compile(r"^(?P<label>[A-Z]'*(?:_\{?\w+\}?)?)\s*(?P<value>\(.*,.*\))$", re.DOTALL)
COORDINATES = re.compile(r"^(?P<label>\(\s*[a-z](?:\s*,\s*[a-z])+\s*\))\s*=\s*(?P<value>\(.*\))$", re.DOTALL)
RADIAN = Unit("angle", Fraction(1))  # of an angle with π and without a unit
LISTED = re.compile(r"\d+(?:,\d+)+")
GROUPED = re.compile(r"(?<=[({\[])\s*[+-]?[1-9]\d{0,2}(?:,\d{3})+(?=\s*(?:\\right)?[)}\]])")  # (1,000)^2, {1,000}
POINTS = re.compile(r"(?:.*[A-Z)]\s*=\s*|[A-Za-z]'*\s*)?[(\[][^()\[\]]*[)\]]", re.DOTALL)  # (1,000), and no number
INDIAN = re.compile(r"(?<![\d.,(\[{])[1-9]\d?(?:,\d\d)+,\d{3}(?![\d,])")  # 12,34,567, which may be a list, too
DECADE = re.compile(r"(?:1[89]|20)[1-9]0'?s")  # but 1800s and 3600s are seconds, as far as one can tell
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


def same_answer(answer: str, gold: str, options: dict[str, str]) -> bool:
    """Whether an answer is the known one, either in any of its readings.

    Args:
        options: letter -> text; then an option's letter and its text are one answer. So are its small letter or its
            number, and its text; but then they may be no options, and what is the same without them stays so.
    """
    both = [readings(answer), readings(gold)]
    if not options.keys().isdisjoint({"1", "a"}):
        both = [texts + [text for each in texts for text in named(plain(each), options)] for texts in both]
        options = {}
    one, other = (re.sub(r"[\s$]", "", text) for text in (answer, gold))
    if one == other and LISTED.fullmatch(one):  # 100,200 and 100, 200
        return True
    ways = [both]
    if any(GROUPED.search(text) for texts in both for text in texts):
        ways.append([[_ungrouped(text) for text in texts] for texts in both])
    if any(INDIAN.search(text) for texts in both for text in texts):
        ways.append([[INDIAN.sub(lambda number: number[0].replace(",", ""), text) for text in texts] for texts in both])
    return any(_same(plain(one), plain(other), options) for way in ways for one, other in product(*way))


def _ungrouped(text: str) -> str:
    """(1000)^2 of (1,000)^2; but (1,000) alone is a point."""
    return text if POINTS.fullmatch(plain(text)) else GROUPED.sub(lambda number: number[0].replace(",", ""), text)


def _same(answer: str, gold: str, options: dict[str, str]) -> bool:
    if not answer or not gold:
        return False
    options = {letter: plain(text) for letter, text in options.items()}
    if _same_text(answer, gold):
        return True
    found, known_parts = parts(answer), parts(gold)
    if found and known_parts:
        return found.keys() == known_parts.keys() and all(_equal(found[name], known_parts[name]) for name in found)
    several, known_several = choices(answer, options), choices(gold, options)
    if several and known_several:
        return several == known_several
    given, known = choice(answer), choice(gold)
    if known and (known[0] in options or not options) and not _only(gold, options):
        letter, text = known
        if given and (given[0] in options or not options) and not _only(answer, options):
            return given[0] == letter
        if options:
            return _chosen(answer, options) == {letter}
        return bool(text) and _equal(answer, text)
    if given and given[0] in options:
        return _equal(options[given[0]], gold)
    if given and given[1] and not options and _equal(given[1], gold):
        return True
    return _equal(answer, gold)


def _only(text: str, options: dict[str, str]) -> bool:
    """Whether a text that looks like a letter is one option's text, as `A 5` may be, and none's letter."""
    return any(_same_text(text, other) for other in options.values()) and len(text) > 1


def _chosen(answer: str, options: dict[str, str]) -> set[str]:
    """The letters of the options that an answer can mean; what is written alike comes before what is equal."""
    alike = {letter for letter, text in options.items() if text and _same_text(answer, text)}
    return alike or {letter for letter, text in options.items() if text and _equal(answer, text)}


def _same_text(one: str, other: str) -> bool:
    one, other = (re.sub(r"\s*([,;:=+*/^()\[\]{}<>-])\s*", r"\1", text) for text in (one, other))
    if one == other:
        return bool(one)
    one, other = (ARTICLE.sub("", text) for text in (one, other))
    return one.casefold() == other.casefold() and bool(
        re.fullmatch(r"[A-Ja-j]|(?:[^\W\d_]{2,}|a|an|I)(?:[\s,'-]+(?:[^\W\d_]{2,}|a|an|I|s))*", one, re.IGNORECASE)
    )


def _equal(answer: str, gold: str) -> bool:
    """Whether two plain texts say the same, with the same unit if both have one."""
    if _same_text(answer, gold):
        return True
    (answer, label), (gold, known) = _unlabel(_alone(answer)), _unlabel(_alone(gold))
    if label and known and label != known:
        return False
    if _same_text(answer, gold):
        return True
    if _long(answer, gold):
        number = _number(answer)
        return number is not None and number == _number(gold)
    if "\\approx" in answer and "\\approx" not in gold:  # a value, and what it is nearly
        return any(_equal(side.strip(), gold) for side in answer.split("\\approx") if side.strip())
    several = _items(answer), _items(gold)
    if not all(several):
        answer, gold = _last_side(answer, gold), _last_side(gold, answer)
        if ("=" in answer) != ("=" in gold):  # 2x = 10 is not 10
            return False
        several = _items(answer), _items(gold)
    if several[0] and several[1]:
        (brackets, items), (known_brackets, known_items) = several
        if len(items) != len(known_items):
            return False
        if brackets in ("", "{}") and known_brackets in ("", "{}"):
            return _same_items(items, known_items)
        if brackets == "":
            brackets = known_brackets if all(_unlabel(item)[1] for item in items) else brackets
        return brackets == known_brackets and all(map(_equal, (_unlabel(i)[0] for i in items), known_items))
    if several[0] or several[1]:
        if "\\pm" not in answer + gold and not re.search(r"[<>]|\\(?:le|ge|lt|gt|cup|in)", answer + gold):
            return False
    return _equal_values(answer, gold)


def _alone(text: str) -> str:
    """5 of `{5}`."""
    brackets, items = _items(text) or ("", [])
    return items[0] if brackets == "{}" and len(items) == 1 else text


def _same_items(items: list[str], known: list[str]) -> bool:
    """As a set, unless each has a name of its own."""
    left = list(known)
    for item in items:
        match = next((other for other in left if _equal(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _unlabel(text: str) -> tuple[str, str | None]:
    """`S_{ABC} = 12` -> ("12", "S_{ABC}"): what is left of one = and is no formula itself."""
    match = LABEL.match(text) or POINT.match(text) or COORDINATES.match(text)
    if not match or re.search(r"(?:=|<|>|\\(?:le|ge|ne)\b)", match["value"]):
        return text, None
    if re.match(r"\d{1,2}:\d\d", text) or re.search(r"(?i)\b(?:not|no|than|least|most|or|and)\b", match["label"]):
        return text, None
    return match["value"].strip(), re.sub(r"\s+|[{}]", "", match["label"])


def _last_side(text: str, other: str) -> str:
    """24 of `3*8 = 24`; of a formula with unknowns no side is the answer."""
    if "=" not in text or "=" in other or re.search(r"[<>]", text):
        return text
    left, _, right = text.rpartition("=")
    numeric = not re.search(
        r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|cdot|times|pi|degrees|log|ln|sin|cos|tan)|degrees", "", left)
    )
    first = left.partition("=")[0]
    return right.strip() if numeric or _unlabel(f"{first} = 0")[1] else text


def _items(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list, set, point or interval, and what is in it; None for one value."""
    text = text.strip()
    text = re.sub(r"^\\\{(.*)\\\}$", r"{\1}", text, flags=re.DOTALL)
    brackets, inside = "", text
    if sum_of_units(text):
        return None
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and closing(text) == len(text) - 1:
        brackets, inside = text[0] + text[-1], text[1:-1]
    parts, depth, start = [], 0, 0
    for mark in re.finditer(r"[(\[{]|[)\]}]|,|;|\b(?:or|and)\b", inside):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(inside[start : mark.start()])
            start = mark.end()
    parts = [part.strip() for part in (*parts, inside[start:])]
    filled = [part for part in parts if part]
    if len(filled) < 2:
        return ("{}", filled) if brackets == "{}" and filled else None
    return brackets, filled


def _long(*texts: str) -> bool:
    return any(len(text) > DIGITS and re.search(rf"\d{{{DIGITS}}}", text) for text in texts)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text) if NUMBER.fullmatch(text) else None
    except InvalidOperation:
        return None


def _equal_values(answer: str, gold: str) -> bool:
    """Whether two plain texts are equal as mathematics, with the same unit if both have one."""
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", answer + gold):
        answer, gold = (re.sub(r"([\d.]+)\s*degrees", r"(\\frac{\1\\pi}{180})", text) for text in (answer, gold))
    (value, unit), (known_value, known) = split_unit(answer), split_unit(gold)
    if known and not unit:
        value, unit = split_unit(answer, tight=True)
    if unit and not known:
        known_value, known = split_unit(gold, tight=True)
    if "\\pi" in value and unit is None and known and known.kind == "angle":
        unit = RADIAN
    if "\\pi" in known_value and known is None and unit and unit.kind == "angle":
        known = RADIAN
    if unit and known and unit.kind != known.kind:
        return False
    if _only_text(value) or _only_text(known_value):
        return _same_text(value, known_value) and (unit is None or known is None or unit == known)
    if DECADE.fullmatch(value) or DECADE.fullmatch(known_value):  # math-verify leaves the s out
        return value.replace("'", "") == known_value.replace("'", "")
    names = [_variables(text) for text in (value, known_value)]
    if names[0] != names[1] and {name.casefold() for name in names[0]} == {name.casefold() for name in names[1]}:
        return False  # R is not r, which math-verify takes for the same
    values = [_parse(text) for text in (value, known_value)]
    if not all(values):
        return False
    if unit and known and unit != known:
        values = [_in_base(each, of) for each, of in zip(values, (unit, known), strict=True)]
        if not all(values):
            return False
    return _equal_sympy(values[0], values[1])


def _in_base(values: list, unit: Unit) -> list:
    from sympy import Expr, Float, Rational

    factor, offset = (Rational(n.numerator, n.denominator) for n in (unit.factor, unit.offset))
    factor = factor if factor.q < 10**12 else Float(factor)  # a degree, which pint has as a decimal
    return [value * factor + offset for value in values if isinstance(value, Expr)]


def _equal_sympy(values: list, known: list) -> bool:
    from math_verify import verify
    from sympy import Number, Rational

    values, known = _as_sets(values, known), _as_sets(known, values)
    if not verify(known, values, timeout_seconds=None):
        return False
    one, other = values[0], known[0]
    percent = any("%" in str(each) or "1/100" in str(each) for each in (one, other))
    if not percent and isinstance(one, Number) and isinstance(other, Number) and one != other:
        # math-verify rounds to six decimals, to which 1e-10 is 2e-10
        return bool(abs(Rational(one) - Rational(other)) <= Rational(2, 10**6) * abs(Rational(other)))
    return True


def _as_sets(values: list, others: list) -> list:
    """The numbers that an inequality holds for, where the other answer is a set of numbers."""
    from sympy import Set
    from sympy.logic.boolalg import Boolean

    (value, *_), (other, *_) = values, others
    if isinstance(value, Boolean) and isinstance(other, Set) and len(value.free_symbols) == 1:
        return [value.as_set()]
    return values


def _variables(text: str) -> set[str]:
    return {*re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|\bor\b", "", text))}


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse
    from sympy import Or
    from sympy.logic.boolalg import Boolean

    if len(parts := re.split(r"\bor\b", text)) > 1:
        either = [value for part in parts for value in _parse(part)[:1]]
        if len(either) == len(parts) and all(isinstance(value, Boolean) for value in either):  # x<2 or x>3
            return [Or(*either)]
    # The whole of it or nothing: the default would be content with some number in it.
    return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def _only_text(text: str) -> bool:
    """Words, a date, a time of day or a range: math-verify would multiply letters, divide hours by minutes, and take
    2015 from 2010."""
    if RANGE.fullmatch(text.strip()):
        return True
    without = re.sub(r"\\log\s*_\s*(?:\{\d+\}|\d)|\\[A-Za-z]+|\b(?:or|and)\b", " x ", text)
    return bool(
        re.search(
            r"[^\W\d_]{2,}|\b\d{1,2}:\d\d\b|\b\d{4}-\d\d-\d\d\b|\b\d\d?/\d\d?/\d{4}\b|\d'+\s*$|[?!]{2}|[+\-?]\s*$|_",
            without,
        )
    )


def _end_after(seconds: float) -> None:
    """By a signal, after so much of a processor's time, where the system counts it; 0 is never."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answers lines of [seconds, answer, gold, options]; ends when there are no more, or one takes longer than that."""
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the one who asks; this ends without a traceback
    if hasattr(signal, "setitimer"):  # what the one who asks ignores or blocks would be so here, too
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})

    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)
    split_unit("1 cm")  # reads pint's definitions, for a second
    same_answer("x>3", r"(3,\infty)", {})  # the first of these takes seconds
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, *asked = json.loads(line)
        _end_after(seconds)
        try:
            same = same_answer(*asked)
        except Exception:  # of sympy, at what is no mathematics
            same = False
        _end_after(0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
