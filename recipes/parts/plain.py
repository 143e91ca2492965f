"""How an answer is written: the same answer without what changes only its looks.

What LaTeX, Unicode and words can say in several ways is brought to one of them, the one that math-verify reads.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache

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
        if text[:1] in ("(", "[") and closing(text) == len(text) - 1 and not re.search("[,;]", text):
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


def closing(text: str) -> int:
    """The place of the bracket that closes the first one; -1 where none does."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place
    return -1
