"""Models to merge: a stock adapter with its base, and bases with experts."""

from merging import pair, template  # noqa: F401
from trios import trio, trios  # noqa: F401
