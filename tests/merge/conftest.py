"""Models to merge: a stock adapter with its base, and bases with experts."""

from hub_models import hub  # noqa: F401
from merging import pair, template  # noqa: F401
from transplants import vlms  # noqa: F401
from trios import trio, trios  # noqa: F401
