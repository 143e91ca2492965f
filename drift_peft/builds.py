"""torch and torchvision of two builds: every import of transformers then fails, and speaks of something else."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import TracebackType

SIGNS = ("torchvision::nms does not exist", "PyTorch and torchvision were compiled with different CUDA")


def explained(error: Exception) -> Exception:
    """The error as it is, or an ImportError of one sentence where such builds are what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if any(sign in str(cause) for sign in SIGNS):
            return ImportError(
                f"torchvision {version('torchvision')} is of another build than torch {version('torch')}, and "
                "transformers cannot be imported beside it: install both from one place, on a machine without a GPU "
                "with pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
            )
        cause = cause.__cause__ or cause.__context__
    return error


def explain_imports(script: str) -> None:
    """While a script is imported: end in this sentence where such builds are what stops it, and as Python does else."""

    def say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        told = explained(error) if isinstance(error, Exception) else error
        if told is error:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"{script}: error: {told}", file=sys.stderr)

    sys.excepthook = say
