"""Ctrl-C while a script still imports what it needs, which takes seconds: one sentence, and no traceback.

A script imports this first. Nothing has begun by then, so nothing has to be cleaned up.
"""

import os
import signal
import sys


def _stop(*_) -> None:
    print(f"{os.path.basename(sys.argv[0])}: stopped before anything had begun", file=sys.stderr, flush=True)
    os._exit(130)  # an exception may come out of the import of a C extension as something else


def imported() -> None:
    """From here on, Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_script = os.path.dirname(os.path.realpath(sys.argv[0]))
if _script == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # else whoever imports the script decides
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
