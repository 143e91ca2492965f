"""What each setting is, in words, from the fields themselves: for `help(DriftConfig)` and for the documentation."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

WIDTH = 112  # of a docstring's lines, which help() indents


@dataclass(frozen=True)
class Described:
    """A field of a configuration, as a reader needs it."""

    name: str
    type: str
    default: str
    range: str  # what its value may be; empty where the type says it all
    meaning: str


def describe(config: type, names: Iterable[str] | None = None) -> list[Described]:
    """The fields of a dataclass in their order, by their `help` and `range`; those of `names` alone if it is given."""
    hints = get_type_hints(config)
    wanted = None if names is None else set(names)
    return [_describe(f, hints[f.name]) for f in fields(config) if wanted is None or f.name in wanted]


def own_fields(config: type, parent: type) -> list[str]:
    """What a configuration adds to its parent's fields, or gives another default."""
    known = {f.name: f for f in fields(parent)}
    return [f.name for f in fields(config) if f.name not in known or f.default != known[f.name].default]


def documented(parent: type):
    """Class decorator: the fields that are not the parent's as the docstring's Args, before what it raises."""

    def insert(config: type) -> type:
        if config.__doc__:  # python -OO has none
            text, raises, errors = inspect.cleandoc(config.__doc__).partition("Raises:")
            described = describe(config, own_fields(config, parent))
            config.__doc__ = f"{text}Args:\n{''.join(map(_argument, described))}\n{raises}{errors}"
        return config

    return insert


def _describe(f: Field, hint: Any) -> Described:
    choices = ", ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else ""
    limits = f.metadata.get("range", "")
    return Described(
        name=f.name,
        type="str" if choices else str(f.type),
        default=repr(f.default if f.default_factory is MISSING else f.default_factory()),
        range="; ".join(part for part in (choices, limits) if part),
        meaning=f.metadata.get("help", ""),
    )


def _argument(field: Described) -> str:
    """As in the docstring of `LoraConfig`."""
    allowed = f" Allowed: {field.range}." if field.range else ""
    text = textwrap.fill(field.meaning + allowed, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"    {field.name} (`{field.type}`, defaults to `{field.default}`):\n{text}\n"
