"""Processes that carry out a part of a command each, and end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .terminal import hush, read_utf8


@contextlib.contextmanager
def workers(count: int) -> Iterator[Executor]:
    """So many new processes, which import what they need. Whatever they are doing, they end at an error or Ctrl-C.

    Raises:
        ChildProcessError: one of them was killed from outside.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                "one of the processes was killed, perhaps for want of memory: --processes 1 takes less"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all: the command itself ends its workers
    read_utf8()
    hush()
