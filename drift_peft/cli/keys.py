"""The key of a server, which no command line holds."""

from __future__ import annotations

import os


def key_of(name: str | None) -> str | None:
    """What the environment variable of --api-key-env holds; None without one.

    Raises:
        ValueError: there is no such variable, or it is empty.
    """
    if name and not os.environ.get(name):
        raise ValueError(f"--api-key-env {name}: there is no such environment variable, or it is empty")
    return os.environ[name] if name else None
