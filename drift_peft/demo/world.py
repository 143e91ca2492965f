"""Visual arithmetic over real handwritten digits: the images, the tasks and their answers.

A sample is a row of symbols such as 7-3+4, shown either as an image or as text, with a question and an answer::

    read?    7-3+4                                       perception: copy the symbols
    at3?     3                                           perception: which symbol is the third
    count?   5                                           perception: how many symbols are there
    solve?   <think>7-3=4;4+4=8</think>\\boxed{8}         reasoning, one operation after the other

The digits are scikit-learn's `load_digits`: 1,797 scans of handwriting, 8x8 pixels each. A digit that trains a model
never tests one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELL = 12  # pixels per symbol, in both directions: exactly one token of the language model
SPLITS = {"train": 1200, "validation": 200, "test": 397}  # of the 1,797 digits
PERCEPTION = ("read", "at", "count")
LONGEST = 11  # symbols: five operations


@dataclass(frozen=True)
class Sample:
    """One question about one row of symbols; `image` is None when the symbols are shown as text."""

    task: str
    symbols: str
    question: str
    answer: str
    image: object | None = None  # PIL.Image.Image, mode "L", CELL pixels high and CELL * len(symbols) wide

    def messages(self, answered: bool = False) -> list[dict]:
        """The sample as a chat, ready for `processor.apply_chat_template`."""
        shown = {"type": "text", "text": self.symbols} if self.image is None else {"type": "image", "image": self.image}
        chat = [{"role": "user", "content": [shown, {"type": "text", "text": self.question}]}]
        return chat + [{"role": "assistant", "content": [{"type": "text", "text": self.answer}]}] * answered


class Digits:
    """The handwritten digits of one split, by label.

    Args:
        split: `train`, `validation` or `test`; the three never share a digit.
    """

    def __init__(self, split: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError('the demo needs scikit-learn: pip install "drift_peft[demo]"') from error

        data = load_digits()
        order = np.random.default_rng(0).permutation(
            len(data.target)
        )  # not the run's seed: the split is part of the world
        bounds = np.cumsum([0, *SPLITS.values()])
        start = list(SPLITS).index(split)
        self.indices = order[bounds[start] : bounds[start + 1]]
        self.by_label = [
            data.images[[i for i in self.indices if data.target[i] == label]] / 16.0 for label in range(10)
        ]

    def draw(self, symbols: str, rng: np.random.Generator):
        """The symbols as a greyscale image: another scan, shift and contrast for every symbol, noise over all of it."""
        from PIL import Image

        canvas = np.zeros((CELL, CELL * len(symbols)))
        for i, symbol in enumerate(symbols):
            glyph = _OPERATORS[symbol] if symbol in _OPERATORS else rng.choice(self.by_label[int(symbol)])
            y, x = rng.integers(1, 4, size=2)
            canvas[y : y + 8, CELL * i + x : CELL * i + x + 8] = rng.uniform(0.7, 1.0) * glyph
        canvas += rng.normal(0, 0.05, canvas.shape)
        return Image.fromarray((255 * canvas.clip(0, 1)).astype(np.uint8))


def _operators() -> dict[str, np.ndarray]:
    minus = np.zeros((8, 8))
    minus[3:5, 1:7] = 1
    return {"-": minus, "+": np.maximum(minus, minus.T)}


_OPERATORS = _operators()


def expression(operations: int, rng: np.random.Generator) -> str:
    """A chain such as `7-3+4`. Every running value lies in 0..9, each as likely: a guess is right one time in ten."""
    value = rng.integers(10)
    text = str(value)
    for _ in range(operations):
        following = rng.integers(10)
        sign = rng.choice(["+", "-"]) if following == value else "+-"[int(following < value)]
        text += f"{sign}{abs(following - value)}"
        value = following
    return text


def solution(chain: str) -> str:
    """Chain of thought and boxed answer of an expression."""
    steps, value = [], int(chain[0])
    for i in range(1, len(chain), 2):
        result = value + int(chain[i : i + 2])
        steps.append(f"{value}{chain[i : i + 2]}={result}")
        value = result
    return f"<think>{';'.join(steps)}</think>\\boxed{{{value}}}"


def make_sample(
    task: str, rng: np.random.Generator, digits: Digits | None = None, operations=(1, 2, 3, 4, 5)
) -> Sample:
    """Draw one sample of `task`: one of `PERCEPTION`, `solve`, or `sum` (a `solve` of one operation).

    Args:
        digits: where the handwriting comes from; None shows the symbols as text.
        operations: how many operations a `solve` may have.
    """
    question, image = f"{task}?", None
    if task in ("solve", "sum"):
        symbols = expression(rng.choice(operations) if task == "solve" else 1, rng)
        question, answer = "solve?", solution(symbols)
    else:
        between = list("+-") if digits else list("+-=;")
        count = rng.choice(operations)
        symbols = "".join(f"{rng.integers(10)}{rng.choice(between)}" for _ in range(count)) + str(rng.integers(10))
        place = rng.integers(len(symbols))
        question = f"at{place + 1}?" if task == "at" else question
        answer = {"read": symbols, "at": symbols[place], "count": str(len(symbols))}[task]
    if digits is not None:
        image = digits.draw(symbols, rng)
    return Sample(task, symbols, question, answer, image)


def make_samples(count: int, tasks, rng: np.random.Generator, digits: Digits | None = None, operations=(1, 2, 3, 4, 5)):
    """`count` samples, each of a task drawn from `tasks` (a task named twice comes twice as often)."""
    return [make_sample(rng.choice(tasks), rng, digits, operations) for _ in range(count)]
