"""Scripts that a script runs in processes of their own, whose memory is free afterwards."""

from __future__ import annotations

import shlex
import subprocess
import sys


class Failed(RuntimeError):
    """Another script has ended with a mistake, and has said which."""


def launch(*command: object) -> None:
    """Run a script or a module; what it prints is progress here.

    Raises:
        Failed: it has failed; it has said why.
    """
    arguments = [*map(str, command)]
    if subprocess.run([sys.executable, *arguments], stdout=sys.stderr.fileno()).returncode:
        raise Failed(
            f"python {shlex.join(arguments)} has failed, as is said above; mend it, and the same command goes on"
        )
