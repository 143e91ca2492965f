"""What the models see and are asked, in natural language.

Images of 48 x 48 pixels show one of four things: a chain such as 7-3+4 in handwriting, a coloured shape, a bar chart,
or a printed word. Six kinds of questions are about what is there, and one asks to calculate::

    describe What do you see?                    A red circle.      of every image
    read     What is written here?               7-3+4
    place    Which symbol is the third?          3
    colour   What colour is the circle?          red
    bars     How many bars are there?            4
    word     Which word is printed here?         lamp
    solve    What is the result? ...             7-3=4. 4+4=8. The answer is 8.

In text a chain comes in several phrasings, as a list of orders, or as a story.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drift_peft.demo.world import CELL, Digits, expression

SIDE = 48
ROW = SIDE // CELL  # cells of a chain in a row of the image
PERCEPTION = ("read", "place", "colour", "bars", "word")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 205, 40),
    "black": (20, 20, 20),
    "pink": (240, 130, 190),
}
SHAPES = ("circle", "square", "triangle")
WORDS = "lamp tree fish moon door bird ship ring book hand star rain".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh".split()
ASKED = {  # several ways to ask the same; exams ask in all of them
    "describe": ["What do you see?", "Describe the picture.", "What does the image show?"],
    "read": ["What is written here?", "Read the symbols in the picture.", "Which row of symbols do you see?"],
    "place": ["Which symbol is the {}?", "Name the {} symbol.", "What is the {} symbol in the picture?"],
    "colour": ["What colour is the {}?", "Which colour does the {} have?", "Name the colour of the {}."],
    "bars": ["How many bars are there?", "Count the bars of the chart.", "How many bars does the chart have?"],
    "word": ["Which word is printed here?", "Read the word.", "What does the picture say?"],
    "solve": ["What is the result?", "Calculate what is written here.", "Work this out step by step."],
}
KEEP_QUESTIONS = [  # what a keep set asks of every image; never for a place, and never to calculate
    *(("describe", question) for question in ASKED["describe"]),
    *((kind, question) for kind in ("read", "bars", "word") for question in ASKED[kind]),
    *(("colour", question) for question in ("Which colour do you see?", "What colour is it?")),
]
PHRASED = ["What is {}?", "Calculate {}.", "Work out {} step by step.", "Please solve {}.", "{} = ?"]
PEOPLE, THINGS = ("Anna", "Ben", "Carla", "David", "Emma"), ("apples", "coins", "books", "cards", "shells")


@dataclass(frozen=True)
class Sample:
    """One question and its answer; `image` is None in text, and `shown` is what an image has, in SmolLM2's tokens."""

    kind: str
    question: str
    answer: str
    image: Image.Image | None = None
    shown: tuple[str, ...] = ()

    def messages(self, answered: bool = False) -> list[dict]:
        """The sample as a chat, ready for `processor.apply_chat_template`."""
        shown = [] if self.image is None else [{"type": "image", "image": self.image}]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": self.question}]}]
        return chat + [{"role": "assistant", "content": [{"type": "text", "text": self.answer}]}] * answered


def solution(chain: str) -> str:
    """`7-3=4. 4+4=8. The answer is 8.`"""
    said, value = [], int(chain[0])
    for i in range(1, len(chain), 2):
        result = value + int(chain[i : i + 2])
        said.append(f"{value}{chain[i : i + 2]}={result}.")
        value = result
    return f"{' '.join(said)} The answer is {value}."


def is_right(sample: Sample, text: str) -> bool:
    """Of a calculation the number after "The answer is" counts, of everything else the whole answer."""
    if sample.kind != "solve":
        return text.strip() == sample.answer
    found = re.search(r"The answer is (-?\d+)\.", text)
    return found is not None and found[0] in sample.answer


def pick(rng: np.random.Generator, options: Sequence) -> object:
    return options[rng.integers(len(options))]


# Text


def text_chain(rng: np.random.Generator, operations: Sequence[int] = (1, 2, 3, 4, 5)) -> Sample:
    """A chain in words: a phrase, a list of orders, or a story."""
    chain = expression(int(pick(rng, operations)), rng)
    steps = [(chain[i], chain[i + 1]) for i in range(1, len(chain), 2)]
    form = rng.integers(3)
    if form == 0:
        question = str(pick(rng, PHRASED)).format(chain)
    elif form == 1:
        orders = [f"{'Add' if sign == '+' else 'Subtract'} {number}." for sign, number in steps]
        question = f"Start with {chain[0]}. {' '.join(orders)} What do you get?"
    else:
        who, what = pick(rng, PEOPLE), pick(rng, THINGS)
        turns = [f"{who} {'gets' if sign == '+' else 'gives away'} {number}." for sign, number in steps]
        question = f"{who} has {chain[0]} {what}. {' '.join(turns)} How many {what} does {who} have now?"
    return Sample("solve", question, solution(chain))


# Images


def random_symbols(operations: int, rng: np.random.Generator) -> str:
    """Digits and signs in turn, which need not make sense as a calculation."""
    return "".join(f"{rng.integers(10)}{pick(rng, '+-')}" for _ in range(operations)) + str(rng.integers(10))


class Pictures:
    """Draws the samples that have an image, from the handwriting of one split: train, validation or test."""

    def __init__(self, split: str):
        self.digits = Digits(split)

    def draw(self, kind: str, rng: np.random.Generator, operations: Sequence[int] = (1, 2, 3, 4, 5)) -> Sample:
        """A question of this kind about an image that it fits; of every kind of image, where it asks what is there."""
        question = str(pick(rng, ASKED[kind]))
        subject = str(pick(rng, ("read", "colour", "bars", "word"))) if kind == "describe" else kind
        if subject in ("read", "place", "solve"):
            count = int(pick(rng, operations))
            symbols = expression(count, rng) if kind == "solve" else random_symbols(count, rng)
            place = int(rng.integers(len(symbols)))
            question = question.format(ORDINALS[place])
            said = {"describe": f"The symbols {symbols}.", "read": symbols, "place": symbols[place]}
            answer = solution(symbols) if kind == "solve" else said[kind]
            image, shown = self.chain(symbols, rng), symbols
        elif subject == "colour":
            colour, shape = str(pick(rng, list(COLOURS))), str(pick(rng, SHAPES))
            question = question.format(shape)
            answer = f"A {colour} {shape}." if kind == "describe" else colour
            image, shown = self.shape(shape, COLOURS[colour], rng), (f" {colour}", f" {shape}")
        elif subject == "bars":
            bars = int(rng.integers(1, 7))
            answer = f"A chart of {bars} bars." if kind == "describe" else str(bars)
            image, shown = self.bars(bars, rng), str(bars)
        else:
            word = str(pick(rng, WORDS))
            answer = f"The word {word}." if kind == "describe" else word
            image, shown = self.word(word, rng), (f" {word}",)
        return Sample(kind, question, answer, image, tuple(shown))

    def chain(self, symbols: str, rng: np.random.Generator) -> Image.Image:
        """In reading order, four cells a row."""
        row = np.asarray(self.digits.draw(symbols, rng))
        square = np.zeros((SIDE, SIDE), np.uint8)
        for i in range(len(symbols)):
            y, x = CELL * (i // ROW), CELL * (i % ROW)
            square[y : y + CELL, x : x + CELL] = row[:, CELL * i : CELL * (i + 1)]
        return Image.fromarray(square).convert("RGB")

    def shape(self, shape: str, colour: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
        image, draw = blank(rng)
        size = int(rng.integers(18, 36))
        left, top = (int(v) for v in rng.integers(2, SIDE - size - 1, size=2))
        box = (left, top, left + size, top + size)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(left + size // 2, top), (left, top + size), (left + size, top + size)], fill=colour)
        return image

    def bars(self, count: int, rng: np.random.Generator) -> Image.Image:
        image, draw = blank(rng)
        colour = COLOURS[str(pick(rng, list(COLOURS)))]
        for i in range(count):
            height = int(rng.integers(10, 44))
            draw.rectangle((2 + 8 * i, SIDE - 2 - height, 2 + 8 * i + 4, SIDE - 2), fill=colour)
        return image

    def word(self, word: str, rng: np.random.Generator) -> Image.Image:
        """At the top left, moved by up to two pixels each way: a tower this small learns no word that lies anywhere."""
        image, draw = blank(rng)
        font = ImageFont.truetype(str(pick(rng, fonts())), int(rng.integers(13, 16)))
        left, top, *_ = draw.textbbox((0, 0), word, font=font)
        x, y = (int(v) for v in rng.integers(0, 3, size=2))
        draw.text((x - left, y - top), word, fill=(20, 20, 20), font=font)
        return image


def blank(rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    paper = tuple(int(v) for v in rng.integers(235, 256, size=3))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    return image, ImageDraw.Draw(image)


@cache
def fonts() -> tuple[Path, ...]:
    """matplotlib brings these along."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return tuple(
        folder / f"DejaVu{name}.ttf"
        for name in ("Sans", "SansMono", "Serif", "Sans-Bold", "Serif-Bold", "SansMono-Bold")
    )


def draw_many(count: int, make: Callable[[np.random.Generator], Sample], seed: Sequence[int]) -> list[Sample]:
    rng = np.random.default_rng(list(seed))
    return [make(rng) for _ in range(count)]


def exams(split: str, seed: int, size: int) -> dict[str, list[Sample]]:
    """`size` samples of each exam: calculation over images as trained and longer, five kinds of perception, text."""
    pictures = Pictures(split)
    kinds = {kind: (lambda rng, kind=kind: pictures.draw(kind, rng)) for kind in PERCEPTION}
    makers = {
        "2-3 operations": lambda rng: pictures.draw("solve", rng, (2, 3)),
        "4-5 operations": lambda rng: pictures.draw("solve", rng, (4, 5)),
        **kinds,
        "text reasoning": lambda rng: text_chain(rng, (2, 3)),
    }
    return {name: draw_many(size, make, (seed, 2, i)) for i, (name, make) in enumerate(makers.items())}
