"""What stops an import, in one sentence: a package that is missing, such as torchvision, which many processors need; or
torch and torchvision of two builds, with which every import of transformers fails and speaks of something else."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from types import TracebackType

SIGNS = ("torchvision::nms does not exist", "PyTorch and torchvision were compiled with different CUDA")
PUBLISHED = re.compile(r"\d+\.\d+\.\d+(\+(cpu|cu\d+|rocm[\d.]+|xpu))?")  # builds that pip finds by their version
WITHOUT_TORCHVISION = re.compile(r"(\w+) requires the Torchvision library")  # as transformers says it


def explained(error: Exception) -> Exception:
    """The error as it is, or an ImportError of one sentence where such builds or a lack of torchvision caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if any(sign in str(cause) for sign in SIGNS):
            return ImportError(
                f"torchvision {version('torchvision')} is of another build than torch {version('torch')}, and "
                "transformers cannot be imported beside it: install both from one place, on a machine without a GPU "
                "with pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
            )
        if match := WITHOUT_TORCHVISION.search(str(cause)):
            torch = version("torch")  # torchvision's build has to be the same
            build = torch.partition("+")[2]
            index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
            way_out = f"pip install torch=={torch} torchvision{index}"
            if not PUBLISHED.fullmatch(torch):
                way_out = f"install the one that belongs to torch {torch}, from where that came"
            return ImportError(f"{match[1]} needs torchvision, which is missing: {way_out}")
        cause = cause.__cause__ or cause.__context__
    return error


def missing(error: BaseException, extra: str = "recipes") -> str | None:
    """Which package of an extra an import has not found, in one sentence; None of another error."""
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if package in (None, "drift_peft", "parts"):  # a mistake of ours
        return None
    return f'{package} is missing: pip install "drift_peft[{extra}]"'


def explain_imports(script: str, extra: str = "recipes") -> None:
    """While a script is imported: if mismatched builds or a missing package stop it, end in one sentence; otherwise
    fail as Python does.

    Args:
        extra: what brings the packages that the script needs.
    """

    def say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        explanation = explained(error) if isinstance(error, Exception) else error
        sentence = missing(error, extra) if explanation is error else str(explanation)
        if sentence is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"{script}: error: {sentence}", file=sys.stderr)

    sys.excepthook = say
