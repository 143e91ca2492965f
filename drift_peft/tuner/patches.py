"""Functions of PEFT and transformers to which something of ours is added."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def in_place_of(owner: Any, name: str) -> Callable[[Callable], Callable]:
    """Decorator: what is called as `owner.name` is this function from now on, which gets the one before it first."""

    def install(function: Callable) -> Callable:
        before = getattr(owner, name)
        before = getattr(before, "in_place_of", before)  # reloading a module must not act twice

        @functools.wraps(before)
        def wrapper(*args, **kwargs):
            return function(before, *args, **kwargs)

        wrapper.in_place_of = before
        setattr(owner, name, wrapper)
        return function

    return install
