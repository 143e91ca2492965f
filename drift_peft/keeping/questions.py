"""What is asked: the built-in questions in questions.txt, or a file of the user's own in the same form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

BUILT_IN = Path(__file__).with_name("questions.txt")


def check_questions(questions: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of kind and question, without space around them, as `read_questions` has them. ValueError if there is
    none, one is half empty or there twice."""
    if not questions:
        raise ValueError(
            "questions is empty: give pairs of a kind and a question, or leave it out for the built-in ones"
        )
    pairs = [(kind.strip(), question.strip()) for kind, question in questions]
    for i, pair in enumerate(pairs):
        if not all(pair):
            raise ValueError(f"questions holds {questions[i]!r}, which is half empty: give a kind and a question")
        if pair in pairs[:i]:
            raise ValueError(f"questions holds {pair!r} twice: take one of them out")
    return pairs


def read_questions(path: str | Path | None = None) -> list[tuple[str, str]]:
    """(kind, question) of each line `kind<TAB>question`, so ordered that the kinds take turns.

    Args:
        path: file of questions; without it the built-in ones. Empty lines and those that begin with # are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has no tab, is half empty or is there twice; there is no question; the file is no UTF-8 text.
    """
    path = BUILT_IN if path is None else Path(path)
    questions: dict[tuple[str, str], int] = {}
    for number, line in enumerate(read_lines(path, "questions"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        kind, _, question = (part.strip() for part in line.partition("\t"))
        if not kind or not question:
            raise ValueError(f"line {number} of {path} is no question: write its kind, a tab, and the question")
        if (kind, question) in questions:
            raise ValueError(f"line {number} of {path} is the same question as line {questions[kind, question]}")
        questions[kind, question] = number
    if not questions:
        raise ValueError(f"{path} holds no question: write one a line, its kind, a tab, and the question")
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, question in questions:
        kinds.setdefault(kind, []).append((kind, question))
    return [question for question in chain.from_iterable(zip_longest(*kinds.values())) if question]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file of questions or prompts, which end at line feeds alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of {what} {path}")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the {what} in {path} are no UTF-8 text: save the file as such") from error
