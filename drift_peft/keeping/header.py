"""The headers of a keep set's file and of an answer set's: their form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from ..checkpoints import Origin, Schema, Text


class Tokenizer(Schema):
    size: PositiveInt
    sha256: str


class Generation(Schema):
    max_new_tokens: PositiveInt


class Header(Schema):
    """As file.py describes it."""

    vlm: Origin
    model_type: str
    vocabulary: PositiveInt
    tokenizer: Tokenizer
    processor: str
    image_mode: str
    prompt_sample: NonNegativeInt = 0
    prompt_tokens: PositiveInt
    ends: list[int]
    k: PositiveInt
    seed: int
    generation: Generation
    questions: list[Annotated[list[Text], Field(min_length=2, max_length=2)]]
    answers: list[Text] = Field(min_length=1)


class AnswersHeader(Schema):
    """As answer_set.py describes it."""

    expert: Origin
    identity: str
    tokenizer: Tokenizer
    k: PositiveInt
    generation: Generation
    prompts: list[Text] = Field(min_length=1)
    answers: list[Text]
