"""What the chat template makes of an answer: the same words, and an end after them."""

from __future__ import annotations

import itertools

import datasets

from .bad_sample import printable
from .layouts import last_answer
from .loading import PLACE
from .trained import special_tokens

FIRST = 8  # samples of a stream
SHORT = 120  # signs of a text that an error shows


def check_template(dataset, processor) -> None:
    """Compare what would be trained with each answer; of a stream, with the first ones.

    Templates of reasoning models take the reasoning out of an answer, and a few write no token that ends it: the model
    would learn the bare answer, or never to stop.

    Raises:
        ValueError: they differ; it shows both.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    ends, eos = special_tokens(processor), tokenizer.eos_token

    def rendered(turns: list[dict]) -> str:
        return processor.apply_chat_template(turns, tokenize=False)

    stream = isinstance(dataset, datasets.IterableDataset)
    samples = dataset.take(FIRST) if stream else dataset.remove_columns("images")
    for number, sample in enumerate(samples, 1):
        turns = sample["messages"]
        before, whole = rendered(turns[:-1]), rendered(turns)
        alike = itertools.takewhile(lambda signs: signs[0] == signs[1], zip(before, whole, strict=False))
        output = _words(whole[sum(1 for _ in alike) :])
        answer = _words(last_answer(turns))
        place = sample.get(PLACE) or f"sample {number}"
        message = f"{place} would not be trained as it is written: its answer is {_short(answer)}, and the chat "
        way_out = "set chat_template_path to a template that keeps it"
        place = output.rfind(answer)
        if place < 0:
            raise ValueError(f"{message}template makes of it {_short(output)}: {way_out}, such as a .jinja file")
        after = output[place + len(answer) :].strip()
        twice = next((end for end in ends if answer.endswith(end) and (after.startswith(end) or end == eos)), None)
        if twice:
            raise ValueError(f"{message}template ends it too: take {twice} out of the answers")
        if not any(end in output[place + len(answer) :] for end in ends):
            raise ValueError(
                f"{message}template writes {_short(output)}, with no token that ends it: {way_out} and ends it"
            )


def _words(text: str) -> str:
    """Templates differ in white space alone, and that is theirs to set."""
    return " ".join(text.split())


def _short(text: str) -> str:
    shown = text if len(text) <= SHORT else f"{text[: SHORT // 2]} … {text[-SHORT // 2 :]}"
    return f"“{printable(shown)}”"
