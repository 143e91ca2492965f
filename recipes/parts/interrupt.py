"""What ends a script while it still imports what it needs, which takes seconds: one sentence, and no traceback.

That is Ctrl-C, and torchvision of another build than torch. A script imports this first. Nothing has begun by then, so
nothing has to be cleaned up.
"""

import os
import signal
import sys

from drift_peft.builds import explained


def _say(kind, error, traceback) -> None:
    told = explained(error) if isinstance(error, (ImportError, RuntimeError)) else error
    if told is error:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"{os.path.basename(sys.argv[0])}: error: {told}", file=sys.stderr, flush=True)


def _stop(*_) -> None:
    print(f"{os.path.basename(sys.argv[0])}: stopped before anything had begun", file=sys.stderr, flush=True)
    os._exit(130)  # an exception may come out of the import of a C extension as something else


def imported() -> None:
    """From here on, Ctrl-C is a KeyboardInterrupt again, and an error is Python's."""
    if sys.excepthook is _say:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_script = os.path.dirname(os.path.realpath(sys.argv[0]))
if _script == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # else whoever imports the script decides
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say
