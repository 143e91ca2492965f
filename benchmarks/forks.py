"""Processes that start at once: each forks from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def fork_context(*preloaded: str) -> BaseContext:
    """Where there is no such server, as on Windows, each process imports for itself.

    Args:
        preloaded: modules that the server imports, once. It finds what is installed, and what is on PYTHONPATH.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preloaded])
    return context
