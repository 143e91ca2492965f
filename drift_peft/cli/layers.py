"""What --only-layers takes."""

import re
from collections.abc import Sequence

from ..choices import MOST_LAYERS


def layers(numbers: Sequence[str] | None) -> list[int] | None:
    """0 4 8-27 -> the numbers.

    Raises:
        ValueError: one is neither a number nor a range, or names more layers than any model has.
    """
    indices = []
    for number in numbers or ():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", number)
        between = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not between:
            raise ValueError(f"--only-layers takes numbers and ranges, such as 0 4 8-27, got {number}")
        if between.stop > MOST_LAYERS:
            raise ValueError(f"--only-layers names layer {between.stop - 1}, and no model has more than {MOST_LAYERS}")
        indices += between
    return indices or None
