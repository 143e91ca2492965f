"""`5 cm^2` as a value and a unit of pint, or a noun that is counted; not any word is a unit.

`5 or more`, `5 million` and `2 pi` have no unit: what a word says about the number must not be lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise

# One letter may be a variable: only these are read as units, and only after a space.
SINGLE = {*"mgshLlNJWVAKCFTΩ°Å"}
CURRENCIES = {"€": "euro", "£": "pound_sterling", "¥": "yen", "₹": "rupee", "₩": "won", r"\$": "dollar"}
DEFINITIONS = (
    "dollar = [dollar] = dollars = USD", "cent = dollar / 100", "euro = [euro] = euros = EUR",
    "pound_sterling = [sterling] = GBP", "yen = [yen] = JPY", "rupee = [rupee] = rupees = INR", "won = [won] = KRW",
)  # fmt: skip
# Read by pint as units, or plural in form, but saying something else about the number beside them.
NO_UNIT = {*"""pi e c am pm quarter quarters half halves third thirds square squares cube cubes squared cubed sq cubic
    is as was has this its his us plus minus times less unless versus vs perhaps sometimes always besides others
    hundreds thousands millions billions trillions dozens tens percents factorial choose mod modulo
    th st nd rd hundredths thousandths millionths""".split()}  # fmt: skip
CHANGES = re.compile(  # a noun beside these is not what the number counts
    r"(?i)\b(?:or|and|not|no|more|less|fewer|than|least|most|plus|minus|times|over|under|above|below|about|to|by|between|"
    r"if|of|hundred|thousand|million|billion|trillion|dozen|half|squared|cubed|pi|root|percent|point|negative|"
    r"except|without|but|either|nor|never|is|are|was|were|out)\b"
)
IRREGULAR = {*"people children men women mice feet teeth geese sheep fish deer dice data vertices".split()}
GENERIC = re.compile(r"(?i)^(?:(?:square|sq\.?|cubic)\s+)?units?(?:\s*(?:\^?\{?[23]\}?|squared|cubed))?$")
TRAILING = re.compile(
    r"(?i)\s+(?:long|wide|tall|high|deep|old|away|apart|total|altogether|remaining|left|in\s+(?:total|all|length|height|"
    r"width|area|volume))\s*$"
)
START = re.compile(r"(?:(?<=[\d)}.|])|(?<=\\pi)|(?<=\\infty))(?P<space>\s*)(?=[^\W\d_]|°)")
WORD = r"[^\W\d_°]+|°[CF]?"
POWER = r"(?:\s*\^\s*\{?\s*\(?-?\d\)?\s*\}?|[23])?"  # cm3, as scanned text has it
JOIN = r"\s*(?:/|\*|·|\\cdot\b|\\times\b|\s)\s*\(?\s*"
SHAPE = re.compile(rf"(?:{WORD})\.?{POWER}(?:{JOIN}(?:{WORD}){POWER}\)?)*\.?")
BRACKETED = re.compile(r"(.*\S)\s+[(\[]\s*([^()\[\]]{2,})[)\]]", re.DOTALL)  # 24 (cm^2)
PIECE = re.compile(r"\s*(?:,|and\b)?\s*(\d+(?:\.\d+)?|\(?\d+/\d+\)?)\s*([^\W\d_]+|')\.?")


@dataclass(frozen=True)
class Unit:
    """What a value is of: `kind` is the same for all that can be compared, `factor` leads to the kind's own unit."""

    kind: str
    factor: Fraction
    offset: Fraction = Fraction(0)  # of temperatures


def split_unit(text: str, tight: bool = False) -> tuple[str, Unit | None]:
    """`5 cm^2` -> ("5", Unit); (text, None) where there is none.

    Args:
        tight: also read `5m`, which may be a variable, and `5 apple`.
    """
    text = TRAILING.sub("", text)
    if summed := sum_of_units(text):
        return summed
    for sign, name in CURRENCIES.items():
        if sign in text:
            rest = text.replace(sign, " ", 1).strip()
            rest = re.sub(r"^US\s+", "", re.sub(r"^-\s+", "-", rest))
            return (rest, _of_pint(name)) if rest else (text, None)
    text = re.sub(r"\s*[(\[]\s*\\?%\s*[)\]]$", r"\\%", text)  # 5 (%)
    if bracketed := BRACKETED.fullmatch(text):  # a unit, or a factor of the value
        value, unit = split_unit(f"{bracketed[1]} {bracketed[2]}", tight)
        return (value, unit) if value == bracketed[1] else (text, None)
    for start in START.finditer(text):
        value, written = text[: start.start()], text[start.end() :].strip()
        if not written or (
            len(written) == 1 and (written not in SINGLE or not (start["space"] or tight or written in "°Ω"))
        ):
            continue
        if GENERIC.fullmatch(written):
            return value, None
        if SHAPE.fullmatch(written) and (unit := _of_pint(written)):
            return value, unit
        if start["space"] and (noun := _noun(written, tight or value == "1")):
            return value, Unit(f"noun {noun}", Fraction(1))
    return text, None


@cache
def _registry():
    import pint

    registry = pint.UnitRegistry(non_int_type=Fraction, autoconvert_offset_to_baseunit=True)
    for definition in DEFINITIONS:
        registry.define(definition)
    return registry


@cache
def _of_pint(written: str) -> Unit | None:
    """A unit that pint knows, if its words are not among those that say something else."""
    import pint

    text = re.sub(r"\\(?:cdot|times)\b|·", "*", written).replace("{", "").replace("}", "").rstrip(".")
    text = re.sub(r"°\s*C\b|\bdegrees?\s+(?:Celsius|C)\b|\bCelsius\b", "degC", text, flags=re.IGNORECASE)
    text = re.sub(r"°\s*F\b|\bdegrees?\s+(?:Fahrenheit|F)\b|\bFahrenheit\b", "degF", text, flags=re.IGNORECASE)
    text = text.replace("°", "degree").replace("Ω", "ohm")
    text = re.sub(r"(?i)\b(?:square|sq)\b\.?\s+([^\W\d_]+)", r"\1^2", text)
    text = re.sub(r"(?i)\b(?:cubic|cu)\b\.?\s+([^\W\d_]+)", r"\1^3", text)
    text = re.sub(r"(?i)\s+squared\b", "^2", re.sub(r"(?i)\s+cubed\b", "^3", text))
    text = re.sub(r"(?i)\bper\b", "/", text)
    text = re.sub(
        r"\s*\^\s*\(?(-?\d)\)?|(?<=\bm|\bs)([23])|(?<=\bcm|\bmm|\bdm|\bkm|\bin|\bft|\byd)([23])", r"**\1\2\3", text
    )
    text = re.sub(r"(?<=[\w])\s+(?=[^\W\d_])", "*", text.strip())
    words = re.findall(r"[^\W\d_]+", text)
    if not words or any(word.casefold() in NO_UNIT or (len(word) == 1 and word not in SINGLE) for word in words):
        return None
    for form in dict.fromkeys((text, text.lower())):
        try:
            unit = _registry().parse_units(form)
            one, zero = (_registry().Quantity(Fraction(n), unit).to_base_units() for n in (1, 0))
        except (pint.errors.PintError, AttributeError, TypeError, ValueError, ZeroDivisionError, AssertionError):
            continue
        except Exception as error:  # its tokenizer's own
            if "token" in type(error).__name__.casefold() or isinstance(error, SyntaxError):
                continue
            raise
        dimensions = sorted(f"{name}^{power}" for name, power in one.dimensionality.items())
        kind = "angle" if "radian" in dict(one.units._units) and not dimensions else " ".join(dimensions)
        offset = Fraction(zero.magnitude)
        return Unit(kind, Fraction(one.magnitude) - offset, offset)
    return None


def _noun(written: str, single: bool) -> str | None:
    """What is counted, without its plural's s; None if the words may say something else."""
    words = written.rstrip(".").split()
    if len(words) > 3 or CHANGES.search(written) or not all(re.fullmatch(r"[^\W\d_]{2,}", word) for word in words):
        return None
    last = words[-1].casefold()
    if last in NO_UNIT or not (single or last.endswith("s") or last in IRREGULAR):
        return None
    return " ".join([*map(str.casefold, words[:-1]), last.removesuffix("s")])


def sum_of_units(text: str) -> tuple[str, Unit] | None:
    """`1 hour 30 minutes`, in the first of its units."""
    pieces, end = [], 0
    while piece := PIECE.match(text, end):
        pieces.append((Fraction(piece[1].strip("()")), _of_pint("foot" if piece[2] == "'" else piece[2])))
        end = piece.end()
    if len(pieces) < 2 or text[end:].strip() or not all(unit for _, unit in pieces):
        return None
    (_, first), *_ = pieces
    falling = all(one[1].factor > other[1].factor for one, other in pairwise(pieces))
    if not falling or any(unit.kind != first.kind or unit.offset for _, unit in pieces):
        return None
    total = sum(value * unit.factor for value, unit in pieces) / first.factor
    return f"{total.numerator}/{total.denominator}", first
