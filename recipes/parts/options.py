"""The options of a question, and the letters that name them."""

from __future__ import annotations

import itertools
import re

from .reading import DOUBTS

LETTERS = "ABCDEFGHIJ"
JOINED = {"", "or", "and"}  # between the letters of a prompt; AND may be an option
STARTS = 8  # that a question may have, as where its prompt names the letters
MARK = re.compile(
    r"(?:^|(?<=[\s;,|({\[]))(?:[-*•]\s+)?[(\[\"'*{]{0,4}(?P<letter>[A-J])(?:[\"'*)\]]*[.:、．：]|[)\]])[)*\"']*\s*[\"']?(?=\S)"
)
BARE = re.compile(r"^[ \t]*(?P<letter>[A-J])[ \t]+(?=\S)", re.MULTILINE)
LINES = {  # at the starts of lines, in small letters or numbered
    "abcdefghij": re.compile(r"^[ \t]*\(?(?P<letter>[a-j])[.)]\s+(?=\S)", re.MULTILINE),
    "123456789": re.compile(r"^[ \t]*\(?(?P<letter>[1-9])[.)]\s+(?=\S)", re.MULTILINE),
}
END = re.compile(r"[\s;,|/}\]\"']+$")
PROMPT = re.compile(  # in a text, `This Is How You Lose Her`, the later words may stand
    r"[.?;,]?\s+(?=(?:Please|Answer|Select|Choose|Give|Respond|Reply|Directly|Think|You FIRST|What|Which|Output|"
    r"Put)\b)|(?:[.?;]|(?<=[\d%°)}$]))\s+(?=(?:Find|Determine|Calculate|Compute|Solve|How|Hint)\b)"
)
LETTER = re.compile(
    r"(?:option|choice|answer)?\s*[(\[{<]*(?P<letter>[A-Ja-j])(?:[)\]}>]+[.:]?|[.:、．：](?=\s|$)|$)\s*(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
BEFORE = re.compile(  # `B 5`; but `A dog` has no letter, and A ∪ B is a formula
    r"(?P<letter>[A-J])\s+(?![+\-−]\s+\\?[A-Za-z](?![A-Za-z])|->|\\(?:cup|cap|times|cdot|in|to|ne|neq|setminus|subset\w*|"
    r"rightarrow|equiv|perp|sim|land|approx)\b)(?P<text>[\d\\$+\-−(.|√€£].*)",
    re.DOTALL,
)
AFTER = re.compile(r"(?P<text>.*\S)\s*[(\[]\s*(?:option|choice)?\s*(?P<letter>[A-J])[)\]]", re.DOTALL | re.IGNORECASE)
OTHER = re.compile(  # `B. Actually it is A`
    rf"(?:.*[.,;:!?—–]\s*)?{DOUBTS}(?:[^,.:!]{{0,20}}[,.:!])?\s*(?:it\s+is|it['’]s)?\s*"
    r"\(?(?-i:(?P<other>[A-HJ]))\)?[.\s]*",
    re.DOTALL | re.IGNORECASE,
)
PART = re.compile(r"(?:^|(?<=[\s;,]))\(?([a-j])\)\s*")


def read_options(question: str) -> dict[str, str]:
    """Letter -> text as it is written, of the options A, B, … that a question ends with; {} if there are no two.

    In small letters or numbered they may be parts of the question: see `named`. Then no text of a number has a digit:
    `2` could be one's number or another's text.
    """
    found = _options(question, MARK, LETTERS) or _options(question, BARE, LETTERS)
    if not found:
        small, numbers = (_options(question, pattern, names) for names, pattern in LINES.items())
        found = small or ({} if re.search(r"\d", "".join(numbers.values())) else numbers)
    return found


def _options(question: str, pattern: re.Pattern, names: str) -> dict[str, str]:
    """The last that all have a text, as `Answer with A. or B.` has not; if there are none, the last."""
    marks = [*pattern.finditer(question)]
    starts = [i for i, mark in enumerate(marks) if mark["letter"] == names[0]]
    found = [_in_order(question, marks[start : start + len(names)], names) for start in reversed(starts[-STARTS:])]
    told = [options for options in found if not {text.strip(" ,") for text in [*options.values()][:-1]} <= JOINED]
    return next(iter(told or found), {})


def _in_order(question: str, marks: list[re.Match], names: str) -> dict[str, str]:
    pairs = itertools.takewhile(lambda pair: pair[0]["letter"] == pair[1], zip(marks, names, strict=False))
    in_order = [mark for mark, _ in pairs]
    if len(in_order) < 2:
        return {}
    options = {}
    for i, mark in enumerate(in_order):
        last = i + 1 == len(in_order)
        text = question[mark.end() : len(question) if last else in_order[i + 1].start()].strip().partition("\n")[0]
        options[mark["letter"]] = END.sub("", PROMPT.split(text)[0] if last else text)
    return options


def choice(text: str) -> tuple[str, str] | None:
    """(letter, text beside it) of `B`, `(B) 5`, `[B]`, `B 5` or `5 (B)`; None if this names no option, or another."""
    match = LETTER.fullmatch(text) or BEFORE.fullmatch(text) or AFTER.fullmatch(text)
    if not match:
        return None
    letter, other = match["letter"].upper(), OTHER.fullmatch(match["text"])
    return None if other and other["other"] != letter else (letter, match["text"].strip())


def parts(text: str) -> dict[str, str]:
    """Letter -> text of `(a) 4 (b) 12`, an answer in parts; {} if it has not two."""
    before, *found = PART.split(text)
    answers = {letter: answer.strip(" ;,.") for letter, answer in zip(found[::2], found[1::2], strict=True)}
    return answers if not before.strip() and len(answers) > 1 else {}


def named(text: str, options: dict[str, str]) -> list[str]:
    """The text of the option whose number or small letter an answer is, alone or beside it: `2`, `(b)`, `2. blue`."""
    match = re.fullmatch(r"(?is)(?:option\s+)?[(\[]?(?P<name>[1-9a-j])[)\].:]*\s*(?P<text>.*)", text)
    known = options.get(match["name"].casefold(), "") if match else ""
    return [known] if known and match["text"].casefold() in ("", known.casefold()) else []


def choices(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letters of `a, c`, `A and C`, or where there are options `AC`; None if this is something else."""
    if options and len(text) > 1 and set(text) <= options.keys() and [*text] == sorted(set(text)):
        return frozenset(text)
    parts = re.split(r"\s*(?:,|&|;|\band\b)+\s*", text)
    named = [choice(part) for part in parts]
    if len(parts) < 2 or not all(each and not each[1] for each in named):
        return None
    return frozenset(letter for letter, _ in named)
