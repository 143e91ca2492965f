"""Known answers that an exam cannot mark well: sentences, lists and objects, which may be right in other words."""

from __future__ import annotations

from collections.abc import Sequence

from .reading import SHORT, THOUGHT_END, known_answer, read_answer

MANY = 0.1  # of all


def is_loose(text: str) -> bool:
    """Whether a known answer, chain in front or not, is longer than an answer without any mark may be, or an object, or
    the last of a few short lines that no mark tells from an answer of several lines."""
    gold, reading = known_answer(text), read_answer(text)
    if len(gold) > SHORT or (gold[:1] in ("{", "[") and '"' in gold):
        return True
    lines = THOUGHT_END.split(text)[-1].strip().splitlines()
    is_last = reading is not None and reading[1] == "last line" and len(lines) > 1
    return is_last and all(len(line) <= SHORT for line in lines)


def note_of_loose(texts: Sequence[str], source: str) -> str | None:
    """What is to be said where many known answers are so."""
    loose = [text for text in texts if is_loose(text)]
    if len(loose) < MANY * len(texts) or not loose:
        return None
    note = f"note: {len(loose)} of the {len(texts)} known answers of {source} are sentences, lists or objects"
    return f"{note}, which are marked right only where they say the same: ask for short ones, or measure with --keep"
