"""Models to merge, for every file of this folder."""

from trios import trio, trios  # noqa: F401
