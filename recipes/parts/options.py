"""The options of a question, and the letters that name them."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJ"
MARK = re.compile(
    r"(?:^|(?<=[\s;,|({\[]))(?:[-*•]\s+)?[(\[\"'*{]{0,4}(?P<letter>[A-J])(?:[\"'*)\]]*[.:、．：]|[)\]])[)*\"']*\s*[\"']?(?=\S)"
)
BARE = re.compile(r"^[ \t]*(?P<letter>[A-J])[ \t]+(?=\S)", re.MULTILINE)
END = re.compile(r"[\s;,|/}\]\"']+$")
PROMPT = re.compile(
    r"[.?;,]?\s+(?=(?:Please|Answer|Select|Choose|Give|Respond|Reply|Directly|Think|You FIRST|What|Which|Output|Put)\b)"
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


def read_options(question: str) -> dict[str, str]:
    """Letter -> text as it is written, of the options A, B, … that a question ends with; {} if there are no two."""
    return _options(question, [*MARK.finditer(question)]) or _options(question, [*BARE.finditer(question)])


def _options(question: str, marks: list[re.Match]) -> dict[str, str]:
    starts = [i for i, mark in enumerate(marks) if mark["letter"] == "A"]
    marks = marks[starts[-1] :] if starts else []
    in_order: list[re.Match] = []
    for mark in marks:
        if len(in_order) < len(LETTERS) and mark["letter"] == LETTERS[len(in_order)]:
            in_order.append(mark)
        else:
            break
    options = {}
    for i, mark in enumerate(in_order):
        last = i + 1 == len(in_order)
        text = question[mark.end() : len(question) if last else in_order[i + 1].start()].strip().partition("\n")[0]
        options[mark["letter"]] = END.sub("", PROMPT.split(text)[0] if last else text)
    return options if len(options) > 1 else {}


def choice(text: str) -> tuple[str, str] | None:
    """(letter, text beside it) of `B`, `(B) 5`, `[B]`, `B 5` or `5 (B)`; None if this names no option."""
    match = LETTER.fullmatch(text) or BEFORE.fullmatch(text) or AFTER.fullmatch(text)
    return (match["letter"].upper(), match["text"].strip()) if match else None


def choices(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letters of `a, c`, `A and C`, or where there are options `AC`; None if this is something else."""
    if options and len(text) > 1 and set(text) <= options.keys() and [*text] == sorted(set(text)):
        return frozenset(text)
    parts = re.split(r"\s*(?:,|&|;|\band\b)+\s*", text)
    named = [choice(part) for part in parts]
    if len(parts) < 2 or not all(each and not each[1] for each in named):
        return None
    return frozenset(letter for letter, _ in named)
