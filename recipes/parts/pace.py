"""What is said of the exams to come: how many, of how many answers, and how long they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class Pace:
    """Counts exams, and says on stderr what that means.

    Args:
        waiting: names of the exams to come.
        answers: that each of them asks for.
        tokens: of each answer at most.
    """

    def __init__(self, waiting: list[str], answers: int, tokens: int):
        self.waiting = [*waiting]
        if waiting:
            asked = f"{answers} answers of at most {tokens} tokens (--max-new-tokens)"
            print(f"exams to come: {len(waiting)}, each of {asked}", file=sys.stderr, flush=True)

    @contextmanager
    def exam(self, name: str) -> Iterator[None]:
        """One of them, or one of a search, whose number is not known."""
        began = monotonic()
        yield
        if name not in self.waiting:
            return
        self.waiting.remove(name)
        minutes = (monotonic() - began) / 60
        if self.waiting:
            message = (
                f"exams to come: {len(self.waiting)}, {minutes * len(self.waiting):.1f} minutes if they are like it"
            )
            print(f"this exam took {minutes:.1f} minutes; {message}", file=sys.stderr, flush=True)
