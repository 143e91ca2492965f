"""How the report says a number, a place and a comparison: the same words on the page and in its appendices."""

from __future__ import annotations

from collections.abc import Collection, Iterable

NOT_RUN = "not run yet"
MEANS = {"images": "image mean", "all": "mean of all four"}
Difference = tuple[float, float, float]  # in shares: the mean, and the ends of its 95 % interval


def percent(found: Difference) -> str:
    return f"{100 * found[0]:.0f} ± {50 * (found[2] - found[1]):.0f}"


def signed(found: Difference) -> str:
    """A difference in points."""
    return minus(f"{100 * found[0]:+.1f} [{100 * found[1]:+.1f}, {100 * found[2]:+.1f}]")


def points(found: Difference) -> str:
    """How large a difference is that words give the direction of: 5.3 points [3.2, 7.3]."""
    middle, low, high = found if found[0] >= 0 else (-found[0], -found[2], -found[1])
    return minus(f"{100 * middle:.1f} points [{100 * low:.1f}, {100 * high:.1f}]")


def minus(text: str) -> str:
    return text.replace("-", "−")


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def places(found: Iterable[str], of: Collection[str]) -> str:
    """`qwen` and `far`; or every world, if they are all."""
    found = list(dict.fromkeys(found))
    return "every world" if len(found) == len(of) > 1 else listed(found)


def compared(found: dict[str, Difference], of: Collection[str]) -> str:
    """Where the first of two is better, level or worse, and of the last kind that is named, the least difference.

    Args:
        found: world -> the first less the second. A difference whose interval holds 0 is level.
        of: all worlds.
    """
    kinds = {
        "better": [world for world, (_, low, _) in found.items() if low > 0],
        "level": [world for world, (_, low, high) in found.items() if low <= 0 <= high],
        "worse": [world for world, (_, _, high) in found.items() if high < 0],
    }
    said = listed(f"{kind} in {places(worlds, of)}" for kind, worlds in kinds.items() if worlds)
    last = kinds["worse"] or kinds["level"] or kinds["better"]
    least = min(last, key=lambda world: found[world][0])
    if kinds["worse"]:
        return f"{said}, by {points(found[least])}" + (f" in {least}" if len(kinds["worse"]) > 1 else "")
    if kinds["level"]:
        where = f" in {least}" if len(kinds["level"]) > 1 else ""
        return f"{said}, where the difference is {signed(found[least])}{where}"
    return f"{said}, by {points(found[least])}" + (" where it gains least" if len(found) > 1 else "")
