"""What a user gives to a public function: of the type that the signature says, or one sentence that names it."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")

WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
WORDS |= {NoneType: "None", Any: "anything"}
LARGEST = (2 - 2**-23) * 2.0**127  # of fp32's numbers
SLIP = 0.8  # how much a known name has of what was given, at least, if that is a slip of the pen
ALIKE = 0.65  # and if it may be; after a slip, one of three letters has two thirds
ELSEWHERE = {  # our name of a setting -> what it is called in TRL, LLaMA-Factory, axolotl, ms-swift or Unsloth
    "base": ("model", "model_name_or_path", "model_name", "base_model"),
    "data": ("dataset", "dataset_name", "datasets", "train_file"),
    "r": ("rank", "lora_r", "lora_rank"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs"),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size"),
    "max_tokens": ("cutoff_len", "max_seq_length", "max_length", "sequence_len"),
}
SHOWN = 200  # characters of a value in an error


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Refuses, before anything is done, an argument of another type than the function's signature has for it.

    A whole number is taken for a number, but neither a text nor True for a whole one. NumPy's numbers and arrays come
    to the function as Python's, and sets as lists.
    """
    signature = inspect.signature(function)

    @cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function)  # on the first call: some name a class that is still to be made

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says it in Python's own words
        for name, value in given.arguments.items():
            if hints().get(name, Any) is not Any:
                given.arguments[name] = plain(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
                check_type(name, given.arguments[name], hints()[name])
        return function(*given.args, **given.kwargs)

    return checked


def plain(value: Any) -> Any:
    """The same in Python's own numbers and lists, if it is a number or an array of NumPy, or holds such."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value) is dict:
        return {key: plain(entry) for key, entry in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError unless the value is of this type; an empty text, which would be the current folder, is no path."""
    if isinstance(value, str) and not value and Path in get_args(hint):
        raise ValueError(f"{name} is empty: name a file, a folder or a hub id")
    if not is_of(value, hint):
        raise ValueError(f"{name} must be {_words(hint)}, got {_shown(value)}")


def check_whole(least: int = 1, **values: Any) -> None:
    """ValueError unless each of these is a whole number that is large enough."""
    for name, value in values.items():
        if not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number ≥ {least}, got {value!r}")


def is_whole(value: Any, least: int = 1) -> bool:
    return is_of(value, int) and value >= least


def is_number(value: Any) -> bool:
    """Is it one that fp32 can hold?"""
    return is_of(value, float) and abs(value) <= LARGEST


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the known name that is probably meant, or nothing."""
    near = meant(name, known)
    return f"did you mean {near}?" if near else ""


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name of what other trainers call so; else the one that this is probably a typo of; else one whose words
    are among these, or contain them and as many more; else the closest."""
    known, words = sorted(known, key=lambda other: (len(other), other)), _words_of(name)
    near = [ours for ours in known if name.replace("-", "_") in ELSEWHERE.get(ours, ())]
    near += get_close_matches(name, known, 1, SLIP)
    near += [other for other in known if _words_of(other) <= words]
    near += [other for other in known if words < (its := _words_of(other)) and len(its) <= 2 * len(words)]
    near += get_close_matches(name, known, 1, ALIKE)
    return near[0] if near else None


def _words_of(name: str) -> set[str]:
    return {*re.split("[-_]", name)}


def listed(problems: Sequence[str], most: int) -> str:
    """The first of these in one line, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*problems[:most], *more])


def shortened(names: Sequence[str], most: int) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def is_of(value: Any, hint: Any) -> bool:
    """Is the value of this type? Of what can be read only once, the entries stay unread."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if kind in (Union, UnionType):
        return any(is_of(value, member) for member in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(is_of, value, inner))
    if not isinstance(value, os.PathLike if hint is Path else kind or hint):
        return False
    if kind in (Sequence, list, Iterable) and isinstance(value, (Sequence, Mapping)):
        return not isinstance(value, (str, bytes, Mapping)) and all(is_of(entry, inner[0]) for entry in value)
    if kind in (Mapping, dict):
        return all(is_of(key, inner[0]) and is_of(entry, inner[1]) for key, entry in value.items())
    return True


def _shown(value: Any) -> str:
    """A value in an error; of an object that prints as a page, such as a model or a processor, its class."""
    shown = repr(value)
    if type(value).__module__ != "builtins" and ("\n" in shown or len(shown) > SHOWN):
        return f"a {type(value).__name__}"
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def _words(hint: Any) -> str:
    """`int | None` in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        *first, last = map(_words, sorted(inner, key=lambda member: get_origin(member) is not None))  # lists last
        return f"{', '.join(first)} or {last}"
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind is tuple:
        return f"({', '.join(map(_words, inner))})"
    if kind in (Mapping, dict):
        return f"a dict of {_words(inner[0])} to {_words(inner[1])}"
    if kind in (Sequence, list, Iterable):
        return f"a list, each entry of it {_words(inner[0])}"
    return "anything" if isinstance(hint, TypeVar) else WORDS.get(hint) or f"a {hint.__name__}"
