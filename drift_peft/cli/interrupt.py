"""Ctrl-C ends in one sentence, wherever it falls, and whatever a library makes of it."""

from __future__ import annotations

import atexit
import os
import signal
import sys

from ..builds import explain_imports
from .terminal import hush

_came = False


def begin(script: str, extra: str = "recipes") -> None:
    """While a script is imported: Ctrl-C, and a package that is missing, end it in one sentence. No library tells of
    kernels.

    Args:
        extra: what brings the packages that the script needs.
    """
    end_at_ctrl_c(f"{script}: stopped")
    explain_imports(script, extra)
    hush()


def end_at_ctrl_c(sentence: str) -> None:
    """While a program is imported and has begun nothing: end at once. Libraries turn an exception in the midst of their
    import into another one, or lose it."""

    def end(*_) -> None:
        os.write(sys.stderr.fileno(), f"{sentence}\n".encode())
        os._exit(130)

    _install(end)


def raise_at_ctrl_c() -> None:
    """From now on what Python does by itself, and remember it: libraries turn this exception into others, too."""

    def remember(*arguments) -> None:
        global _came
        _came = True
        signal.default_int_handler(*arguments)

    global _came
    _came = False
    _install(remember)


def ctrl_c_came() -> bool:
    """Whether Ctrl-C was pressed since `raise_at_ctrl_c`."""
    return _came


def _install(handler) -> None:
    """Where Ctrl-C is ignored, or is another program's that we run in, this stays so."""
    if not _is_ours(signal.getsignal(signal.SIGINT)):
        return
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # in a thread that is not the first one, which never sees Ctrl-C
        return
    atexit.unregister(_ignore)
    atexit.register(_ignore)  # when all is said, Python's own end is not to be interrupted with a traceback


def _is_ours(handler) -> bool:
    return handler is signal.default_int_handler or getattr(handler, "__module__", None) == __name__


def _ignore() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
