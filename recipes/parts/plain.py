"""How an answer is written: the same answer without what changes only its looks.

What LaTeX, Unicode and words can say in several ways is brought to one of them, the one that math-verify reads.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from .numerals import date_or_time, numbers_in_words

SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "≈": r"\approx ", "±": r"\pm ",
    "θ": r"\theta ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "⁄": "/", "٫": ".",
    "∠": r"\angle ", "△": r"\triangle ", "∅": r"\emptyset ",
    "→": r"\to ", "μ": "µ", "：": ":", "，": ",", "；": ";", "（": "(", "）": ")", "。": ".",
    "’": "'", "‘": "'", "℃": r"^\circ C", "℉": r"^\circ F", "\u2126": "Ω", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
GREEK = "pi|theta|alpha|beta|gamma|infinity|infty"
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln"
BOXES = r"text|textbf|textit|textrm|textsf|textup|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|boldsymbol|bm|unit|si|emph|underline"  # noqa: E501
LIST = (  # (5,250) is a point, and no number
    r"(?P<list>(?:[(\[]|\\\{|(?<![A-Za-z}^_\\])\{)\s*[+-]?\d+(?:\.\d+)?(?:,[+-]?\d+(?:\.\d+)?)+\s*(?:[)\]]|\\?\}))"
)
WRITTEN = (  # how an answer looks, not what it says
    (r"\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])|(?<!(?<!\\)\\)\\[!()\[\]]|\$(?<!\\\$)|\\(?=%)", ""),
    (r"(\\(?:begin|end)\{)p?matrix\}", r"\1bmatrix}"), (r"\s*(&|\\\\|\\end\b)\s*", r"\1"),
    (r"(?<!\\)\\[ ,;:]|~|\\q?quad\b|\\(?:hspace|vspace)\*?\{[^{}]*\}|\\(?:thinspace|enspace|space)\b", " "),
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
    (r"\s*(\\(?:cup|cap))\b\s*", r" \1 "), (r"_\{(\w)\}", r"_\1"), (r"\^\s*(-\d+(?:\.\d+)?)(?![\w.(])", r"^{\1}"),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "),
    (r"\*\*", "^"), (r"(?<=[\w)}])\s*\*\s*(?=[\w(\\])", r"\\cdot "),
    (rf"{LIST}|(?<![\d.,])[1-9]\d{{0,2}}(?:[ ,]\d{{3}})+(?!\d|,\d)", lambda m: m["list"] or re.sub("[ ,]", "", m[0])),
    (r"(?<![\w^_.{])(\d+(?:\.\d+)?)\s*\((?=[\d\s.+*/^-]+\)|\\frac\b)", r"\1\\cdot ("),  # 2(3), which it reads as 2 + 3
    (r"(?<![\d.])(\d{1,15})\s+(\d{1,15})/(\d{1,15})(?!\d)", r"(\1+\2/\3)"),  # 2 1/2, which it reads as 2·1/2
    (r"(?<![\d.])(\d{1,15})\s*\\frac", r"\1\\frac"),
    (r"(?<=\d)[eE]([+-]?\d{1,4})(?!\d)", r"\\times 10^{\1}"),  # 2e3, which it reads as 2·e·3
    (r"\s+", " "),
)  # fmt: skip
ABOUT = re.compile(
    r"(?i)^(?:(?:is|equals|=)\s+)?(?:\\(?:approx|sim|simeq|cong)\b|~|about|approximately|approx\.?|roughly|around|nearly|exactly|"
    r"precisely|only|just|a total of)\s*(?=\S)"
)
PREFIX = re.compile(
    r"(?i)^(?:the )?(?:final |correct |right )*(?:answer|option|choice|result)(?:\s+is\b)?\s*[:=]?\s+(?=\S)|^=\s*(?=\S)"
)


def plain(text: str) -> str:
    """The same answer without what changes only its looks."""
    text = text if text.isascii() else _ascii(text)
    text = re.sub(r"^\s*\*+(.*?)\*+\s*$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\bUS\s*\$|\\\$", "\x00", text)  # a dollar, not the start of mathematics
    if text.count("$") == 1:  # nor where nothing closes it
        text = re.sub(r"\$(?=\d[\d.,]*\s*$)", "\x00", text)
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
    return date_or_time(numbers_in_words(text))


def _ascii(text: str) -> str:
    """What Unicode has signs of its own for, as LaTeX has it. NFKC would make 24 of 2⁴."""
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    text = re.sub("[⁰¹²³⁴-⁾ⁿⁱ]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
    text = re.sub("[₀-₎]+", lambda m: f"_{{{m[0].translate(LOWERED)}}}", text)
    text = re.sub(r"^\s*([①-⑳Ⓐ-ⓩ])(?=[\s.:]|$)", lambda m: f"({unicodedata.normalize('NFKC', m[1])})", text)
    return "".join(map(_ascii_sign, text))


def _ascii_sign(sign: str) -> str:
    """A digit of any script, a full-width sign, a fraction, or a unit in one sign; others as they are."""
    if unicodedata.decomposition(sign).startswith(("<fraction>", "<wide>", "<square>")):
        written = unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
        return f" {written}" if "/" in written and len(written) > 1 else written
    return str(unicodedata.decimal(sign, sign))


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
