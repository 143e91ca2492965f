"""Faults of older versions of PEFT, each refused by name."""

from __future__ import annotations

import peft


def needs_peft(least: tuple[int, int], what: str, fault: str, way_out: str) -> None:
    """ValueError where the installed PEFT is older than `least`, such as (0, 21) for 0.21."""
    if tuple(map(int, peft.__version__.split(".")[:2])) < least:
        raise ValueError(
            f"{what} needs PEFT {least[0]}.{least[1]} or newer, since PEFT {peft.__version__} {fault}: install a newer "
            f"one, or {way_out}."
        )
