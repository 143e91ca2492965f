"""A warning that points at the user's own line, however many libraries lie between it and what is wrong."""

import sys
import warnings

LIBRARIES = {"drift_peft", "peft", "transformers", "trl", "accelerate", "torch", "deepspeed", "bitsandbytes"}
LIBRARIES |= {"schedulefree", "prodigyopt", "lion_pytorch", "functools", "contextlib", "threading", "concurrent"}


def warn(message: str) -> None:
    """`warnings.warn` for the innermost line that is in none of `LIBRARIES`."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level if frame is not None else 2)
