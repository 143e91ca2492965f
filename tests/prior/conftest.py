"""Two models whose Δ is known, for the tests of build.py."""

from known_delta import pair  # noqa: F401
