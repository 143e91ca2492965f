"""Numbers, dates and times in words, as the one way to write them that is compared."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from fractions import Fraction
from functools import cache

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
LONGEST = 20  # words of a number
DATES = ("%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y", "%Y %B %d", "%Y %b %d")
TIMES = ("%I:%M %p", "%I %p", "%H:%M")


@cache
def _words() -> dict[str, int]:
    from num2words import num2words

    return {num2words(n): n for n in (*range(20), *range(20, 100, 10))}


@cache
def _parts_in_words() -> dict[str, int]:
    from num2words import num2words

    named = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
    for n in range(3, 101):
        ordinal = num2words(n, to="ordinal")
        named |= {ordinal: n, f"{ordinal}s": n}
    return named


def _number(words: list[str]) -> int | None:
    """105 of `one hundred and five`; None of what is not how a number is said, such as `nineteen eighty four`."""
    from num2words import num2words

    if not all(words):  # a - b
        return None
    normalized = re.sub(
        rf"\b({'|'.join(SCALES)}) and(?= )", r"\1", re.sub("^an? ", "one ", " ".join(words).casefold())
    ).split()
    total = part = 0
    for word in normalized:
        if word in _words():
            part += _words()[word]
        elif word == "hundred":
            part *= 100
        elif word in SCALES:
            total, part = total + part * 10 ** SCALES[word], 0
        else:
            return None
    spelled = re.sub(r"-|,|\band\b", " ", num2words(total + part)).split()
    return total + part if normalized == spelled else None


def numbers_in_words(text: str) -> str:
    """`two thirds`, `three and a half`, `minus five`, `5 million` and `5 squared` as the numbers that they are."""
    if twice := re.fullmatch(r"(.+?) ?\(([^()]+)\)", text):  # 3 (three)
        one, other = map(numbers_in_words, twice.groups())
        if one == other and twice[1] != twice[2]:
            return one
    if not re.match(r"(?i)^-?(?:[a-z]{3,}(?:[ -]|$)|a |\d[\d.]* ?[a-z])", text):
        return text
    if below := re.match(r"(?i)(?:minus|negative) (?=\w)", text):
        number = numbers_in_words(text[below.end() :])
        return f"-{number}" if number[0] in "0123456789(" else text
    words = re.split(r"[ -]", text)
    for length in range(min(len(words), LONGEST), 0, -1):
        if (number := _number(words[:length])) is not None:
            text = " ".join([str(number), *words[length:]])
            break
    if match := re.fullmatch(r"(?i)(?:(\d+)|an?)[ -]([a-z]+)", text) or re.fullmatch(r"(?i)(one )?(half)", text):
        if part := _parts_in_words().get(match[2].casefold()):
            return f"{match[1] if match[1] and match[1].isdigit() else 1}/{part}"
    if match := re.match(r"(?i)(\d{1,15}) and (an?|[a-z]+|\d{1,15}) ([a-z]+)\b", text):
        count, part = match[2].casefold(), _parts_in_words().get(match[3].casefold())
        count = 1 if count in ("a", "an") else int(count) if count.isdigit() else _words().get(count)
        if count and part:
            return f"({int(match[1]) * part + count}/{part}){text[match.end() :]}"
    text = re.sub(r"(?i)^(-?\d[\d.]*) squared$", r"(\1)^2", text)
    text = re.sub(r"(?i)^(-?\d[\d.]*) cubed$", r"(\1)^3", text)
    if match := re.match(rf"(?i)^(-?\d{{1,15}}(?:\.\d{{1,15}})?) ({'|'.join(SCALES)}|dozen)s?\b(?!-)", text):
        times = 12 if match[2].casefold() == "dozen" else 10 ** SCALES[match[2].casefold()]
        value = Fraction(match[1]) * times
        if value.denominator == 1:
            text = f"{value}{text[match.end() :]}"
    return text


def date_or_time(text: str) -> str:
    """2023-01-05 of a date whose month is named, 15:45 of `3:45 pm`; 01/05/2023, which has two readings, stays."""
    if not 3 < len(text) < 40 or not re.search(r"\d", text):
        return text
    day = " ".join(re.sub(r"(?i)(?<=\d)(?:st|nd|rd|th)\b|,|\bof\b|\bthe\b|(?<=[a-z]{3})\.", " ", text).split())
    day = re.sub(r"(?i)\bsept\b", "Sep", day)
    some = (day, "%Y-%m-%d"), (f"{day} 2000", "month %m day %d"), (f"1 {day}", "%Y-%m")  # no year, or no day
    for candidate, written in some:
        for form in DATES:
            with suppress(ValueError):
                return format(datetime.strptime(candidate, form), written)
    for form in TIMES if re.fullmatch(r"\d{1,2}(?::\d\d)?(?: [ap]m)?", text) else ():  # 10:5 is a ratio
        with suppress(ValueError):
            time = datetime.strptime(text, form)
            if not 1 <= time.hour <= 12:
                return f"{time:%H:%M}"
            half = f" {time:%p}".lower() if "%p" in form else ""  # without it, 3:45 may be pm
            return f"{time.hour}:{time:%M}{half}"
    return text
