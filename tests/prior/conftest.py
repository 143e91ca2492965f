"""Two models whose Δ is known, for the tests of build.py."""

from hub_models import hub  # noqa: F401
from known_delta import pair  # noqa: F401
