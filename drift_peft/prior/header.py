"""The header of a prior's file: its form. What is None by default, but not by its type, may be absent, never null."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from ..checkpoints import Origin, Schema, Text

SHA256 = Field(pattern=r"^[0-9a-f]{64}$")
CORRELATION = Field(ge=-1.001, le=1.001)  # rounded


def _weight_name(name: str) -> str:
    if not re.fullmatch(r"layers\.\d{1,6}\.\w[\w.]*|(?!layers\.)\w+\.\w[\w.]*", name, re.ASCII):
        raise ValueError("is no name of a weight")
    return name


class Statistics(Schema):
    """What was measured of one weight; a matrix has a rank and a fingerprint."""

    shape: list[PositiveInt] = Field(min_length=1, max_length=2)
    delta_norm: FiniteFloat = Field(gt=0)
    base_norm: FiniteFloat = Field(ge=0)
    cosine: FiniteFloat = CORRELATION
    energy: FiniteFloat = Field(ge=0, le=1.001)
    rank: PositiveInt | None = None
    fingerprint: list[FiniteFloat] | None = None
    probe: list[FiniteFloat] | None = None
    rows: NonNegativeInt | None = None
    gates: list[FiniteFloat] = None
    ungated_norm: FiniteFloat = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _of_matrix(self) -> Statistics:
        if len(self.shape) == 2 and (self.rank is None or self.fingerprint is None):
            raise ValueError("a matrix lacks its rank or its fingerprint")
        if len(self.shape) == 2 and len(self.fingerprint) > self.rank:
            raise ValueError("a fingerprint is longer than the rank")
        if self.gates is not None and len(self.gates) != self.rank:
            raise ValueError("there are more or fewer gates than directions")
        return self


class Gated(Schema):
    """Where the gates of a prior came from."""

    prior: str = SHA256
    keep_set: str = SHA256
    base: Origin
    expert: Origin = None


class Parent(Schema):
    """One of the priors that a combined one was made of."""

    weight: FiniteFloat
    sha256: str = SHA256
    expert: Origin | None
    reference: Origin | None
    parents: list[Parent] = Field(default=None, min_length=1)
    gated: Gated = None

    @model_validator(mode="after")
    def _of_something(self) -> Parent:
        if self.expert is None and self.parents is None:
            raise ValueError("neither an expert nor parents are named")
        return self


class Header(Schema):
    """As file.py describes it."""

    weights: dict[Annotated[str, AfterValidator(_weight_name)], Statistics]
    not_steered: list[Text]
    base: Origin
    expert: Origin | None
    reference: Origin | None
    parents: list[Parent] = Field(default=None, min_length=1)
    gated: Gated = None
    rank: PositiveInt | None
    modules: list[str]
    dtype: str
    seed: int | None
    energy: FiniteFloat | None = None
    max_rank: PositiveInt | None = None
    only_layers: list[NonNegativeInt] | None = None
    skip_first: NonNegativeInt | None = None
    force: bool | None = None
    without_counterpart: dict[Text, NonNegativeInt] | None = None

    _of_something = model_validator(mode="after")(Parent._of_something)

    @model_validator(mode="after")
    def _every_weight_has_gates_or_none(self) -> Header:
        for name, stats in self.weights.items():
            if {stats.gates is None, stats.ungated_norm is None} != {self.gated is None}:
                raise ValueError(f"{name} is gated, or has no gates, unlike the whole")
        return self


def is_sum(header: dict) -> bool:
    """Is each cosine the smallest of several experts', or one whose expert has another coefficient here?

    One parent with coefficient 1, as of a gated prior that was truncated, is what it is by itself.
    """
    if "gated" in header or "parents" not in header:
        return False
    first, *others = header["parents"]
    return bool(others) or first["weight"] != 1 or is_sum(first)


def cosine_of(header: dict) -> str:
    """What the cosines in a header are of, in words."""
    if is_sum(header):
        return "farthest expert and base"
    while "gated" not in header and "parents" in header:
        header = header["parents"][0]
    return "base and base + Δ" if "gated" in header else "expert and base"
