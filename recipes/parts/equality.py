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
from functools import cache

from .options import choice, choices
from .reading import readings
from .units import Unit, split_unit, sum_of_units

DIGITS = 300  # of a number beyond which no mathematics is done with it
CLOSE = Fraction(2, 1_000_000)  # relative; 0.333333 is 1/3
SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "²": "^2", "³": "^3",
    "⁻¹": "^{-1}", "⁻²": "^{-2}", "≈": r"\approx ", "±": r"\pm ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4",
    "θ": r"\theta ", "∈": r"\in ", "∪": r"\cup ", "∠": r"\angle ", "△": r"\triangle ", "∅": r"\emptyset ",
    "→": r"\to ", "μ": "µ", "：": ":", "，": ",", "；": ";", "（": "(", "）": ")", "。": ".",
    "\u2126": "Ω", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
GREEK = "pi|theta|alpha|beta|gamma|infinity|infty"
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln"
BOXES = r"text|textbf|textit|textrm|textsf|textup|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|boldsymbol|bm|unit|si|emph|underline"  # noqa: E501
WRITTEN = (  # how an answer looks, not what it says
    (r"\\(?:left|right|big|Big|displaystyle|!|\(|\)|\[|\])(?![A-Za-z])|\$(?<!\\\$)|\\(?=%)", ""),
    (r"\\[ ,;:]|~|\\q?quad\b|\\(?:hspace|vspace)\*?\{[^{}]*\}|\\(?:thinspace|enspace|space)\b", " "),
    (r"\{\s*\}", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc|log|ln))\s*\{([^{}]*\^[^{}]*|[^{}^]*)\}", r"\1(\2)"),
    (rf"\\(?:{BOXES})\s*\{{([^{{}}]*)\}}", r" \1 "),
    (rf"\\(?:{BOXES})\s*\{{([^{{}}]*)\}}", r" \1 "),
    (r"\{\s*\\(?:rm|bf|it)\b\s*([^{}]*)\}", r" \1 "),
    (r"\\(?:rm|bf|it)\b", " "),
    (r"\\Omega\b", " Ω"), (r"\\mu\b\s*(?=[A-Za-z]\b)", " µ"), (r"(?<=µ)\s+(?=[A-Za-z]\b)|(?<= [kMmGµ])\s+(?=Ω)", ""),
    (r"\\%|\s+per\s?cent(?:age)?(?:\s+points?)?\b|\s+percent\b", r"%"), (r"\s*%", r"\\%"),
    (r"\^\s*\{?\s*\\circ\s*\}?|(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o\b)", " degrees "),
    (r"\\(?:degree|textdegree|degrees)\b", " degrees "),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}", lambda m: _recurring(*m.groups())),
    (r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\])sqrt\s*(\d+)", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\])sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
    (r"(?i)\b(?:the )?square root of (\d+)\b", r"\\sqrt{\1}"),
    (rf"(?<![A-Za-z\\])({GREEK})(?![A-Za-z])", lambda m: "\\" + m[1].replace("infinity", "infty") + " "),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?=[\s(\d^\\])", r"\\\1"),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "),
    (r"\*\*", "^"), (r"(?<=[\w)}])\s*\*\s*(?=[\w(\\])", r"\\cdot "),
    (r"(?<![\d.,])(\d{1,3})((?:[ ,]\d{3})+)(?![\d,])", lambda m: m[1] + m[2].replace(" ", "").replace(",", "")),
    (r"(?<![\d.])(\d{1,15})\s+(\d{1,15})/(\d{1,15})(?!\d)", r"(\1+\2/\3)"),  # 2 1/2, which it reads as 2·1/2
    (r"(?<![\d.])(\d{1,15})\s*\\frac", r"\1\\frac"),
    (r"(?<=\d)[eE]([+-]?\d{1,4})(?!\d)", r"\\times 10^{\1}"),  # 2e3, which it reads as 2·e·3
    (r"\s+", " "),
)  # fmt: skip
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ABOUT = re.compile(
    r"(?i)^(?:(?:is|equals|=)\s+)?(?:\\(?:approx|sim|simeq|cong)\b|~|about|approximately|approx\.?|roughly|around|nearly|exactly|"
    r"precisely|only|just|a total of)\s*(?=\S)"
)
PREFIX = re.compile(
    r"(?i)^(?:the )?(?:final |correct |right )*(?:answer|option|choice|result)(?:\s+is\b)?\s*[:=]?\s+(?=\S)|^=\s*(?=\S)"
)
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
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


def same_answer(answer: str, gold: str, options: dict[str, str]) -> bool:
    """Whether an answer is the known one, either in any of its readings.

    Args:
        options: letter -> text; then an option's letter and its text are one answer.
    """
    golds = readings(gold)
    return any(_same(plain(one), plain(other), options) for one in readings(answer) for other in golds)


def _same(answer: str, gold: str, options: dict[str, str]) -> bool:
    if not answer or not gold:
        return False
    options = {letter: plain(text) for letter, text in options.items()}
    if _same_text(answer, gold):
        return True
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


def plain(text: str) -> str:
    """The same answer without what changes only its looks."""
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    text = re.sub(r"^\s*\*+(.*?)\*+\s*$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\bUS\s*\$|\\\$", "\x00", text)  # a dollar, not the start of mathematics
    text = re.sub(r"(?i)(?<=\d)\s*([ap])\.?m\b\.?", lambda m: f" {m[1].lower()}m", text)
    for pattern, written in WRITTEN:
        text = re.sub(pattern, written, text)
    text = text.replace("\x00", r"\$")
    before = None
    while text != before:
        before = text
        text = text.strip().strip('`"“”').strip()
        text = re.sub(r"^'([^']*)'$", r"\1", text)
        if text[:1] in ("(", "[") and _closing(text) == len(text) - 1 and not re.search("[,;]", text):
            text = text[1:-1]
        text = re.sub(r"(?<!\\)[.,;:。\s]+$", "", text)
        text = ABOUT.sub("", PREFIX.sub("", text))
    return _numbers_in_words(text)


@cache
def _words() -> dict[str, int]:
    from num2words import num2words

    return {form: n for n in range(101) for form in (num2words(n), num2words(n).replace("-", " "))}


@cache
def _parts_in_words() -> dict[str, int]:
    from num2words import num2words

    named = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
    for n in range(3, 101):
        ordinal = num2words(n, to="ordinal")
        named |= {ordinal: n, f"{ordinal}s": n}
    return named


def _numbers_in_words(text: str) -> str:
    """`two thirds`, `5 million` and `5 squared` as the numbers that they are."""
    if not re.match(r"(?i)^-?(?:[a-z]{3,}(?:[ -]|$)|a |\d[\d.]* ?[a-z])", text):
        return text
    words = re.split(r"[ -]", text)
    for length in (2, 1):
        if (number := _words().get(" ".join(words[:length]).casefold())) is not None:
            text = " ".join([str(number), *words[length:]])
            break
    if found := re.fullmatch(r"(?i)(?:(\d+)|an?)[ -]([a-z]+)", text) or re.fullmatch(r"(?i)(one )?(half)", text):
        if part := _parts_in_words().get(found[2].casefold()):
            return f"{found[1] if found[1] and found[1].isdigit() else 1}/{part}"
    text = re.sub(r"(?i)^(-?\d[\d.]*) squared$", r"(\1)^2", text)
    text = re.sub(r"(?i)^(-?\d[\d.]*) cubed$", r"(\1)^3", text)
    if found := re.match(rf"(?i)^(-?\d{{1,15}}(?:\.\d{{1,15}})?) ({'|'.join(SCALES)}|dozen)s?\b(?!-)", text):
        times = 12 if found[2].casefold() == "dozen" else 10 ** SCALES[found[2].casefold()]
        value = Fraction(found[1]) * times
        if value.denominator == 1:
            text = f"{value}{text[found.end() :]}"
    return text


def _recurring(whole: str, fixed: str, period: str) -> str:
    """0.1(6) is 1/10·(1 + 6/9)."""
    value = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed) + Fraction(f"{whole or 0}.{fixed or 0}")
    return f"({value.numerator}/{value.denominator})"


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
    found = LABEL.match(text) or POINT.match(text) or COORDINATES.match(text)
    if not found or re.search(r"(?:=|<|>|\\(?:le|ge|ne)\b)", found["value"]):
        return text, None
    if re.match(r"\d{1,2}:\d\d", text) or re.search(r"(?i)\b(?:not|no|than|least|most|or|and)\b", found["label"]):
        return text, None
    return found["value"].strip(), re.sub(r"\s+|[{}]", "", found["label"])


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
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and _closing(text) == len(text) - 1:
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


def _closing(text: str) -> int:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place
    return -1


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
    if unit and known and unit.kind != known.kind:
        return False
    if _only_text(value) or _only_text(known_value):
        return _same_text(value, known_value) and (unit is None or known is None or unit == known)
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
    return {*re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))}


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # The whole of it or nothing: the default would be content with some number in it.
    return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def _only_text(text: str) -> bool:
    """Words, a date or a time of day: math-verify would multiply letters and divide hours by minutes."""
    without = re.sub(r"\\[A-Za-z]+|\b(?:or|and)\b", " ", text)
    return bool(
        re.search(
            r"[^\W\d_]{2,}|\b\d{1,2}:\d\d\b|\b\d{4}-\d\d-\d\d\b|\b\d\d?/\d\d?/\d{4}\b|\d'+\s*$|[?!]{2}|[+\-?]\s*$|_",
            without,
        )
    )


def main() -> None:
    """Answers lines of [answer, gold, options] until there are no more."""
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the one who asks; this ends without a traceback

    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # the one who asks keeps the time
    split_unit("1 cm")  # reads pint's definitions, for a second
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            same = same_answer(*json.loads(line))
        except Exception:  # of sympy, at what is no mathematics: it is not decided
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
