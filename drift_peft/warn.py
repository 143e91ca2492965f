"""A warning that points at the user's own line, however many libraries lie between it and what is wrong; what a file of
others says, as a terminal may show it; and what other libraries raise, in one sentence."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = {"drift_peft", "peft", "transformers", "trl", "accelerate", "torch", "deepspeed", "bitsandbytes"}
LIBRARIES |= {"schedulefree", "prodigyopt", "lion_pytorch", "functools", "contextlib", "threading", "concurrent"}

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text in which what commands a terminal, such as the escape, is spelled out; tabs and ends of lines stay."""
    return _CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text)


def first_line(error: BaseException) -> str:
    """Of what an error of another library says, with the next one after a colon; its class where it says nothing."""
    first, *rest = str(error).strip().split("\n")
    return " ".join([first, *rest[: first.endswith(":")]]).strip() or type(error).__name__


@contextlib.contextmanager
def blamed_on(source: str, failed: str = "cannot be read") -> Iterator[None]:
    """What datasets, pyarrow, the hub's client and the file system raise is a ValueError with this source in it."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        why = "it is not in UTF-8: convert it, as with iconv" if isinstance(cause, UnicodeError) else first_line(cause)
        raise ValueError(f"{source} {failed}: {why}") from error


def warn(message: str) -> None:
    """`warnings.warn` for the innermost line that is in none of `LIBRARIES`."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(visible(message), UserWarning, stacklevel=level if frame is not None else 2)


def warn_of_hub(source: str) -> None:
    """Before what is not here is asked for on the hub, which takes half a minute without a network: where the first
    folder of its path is here, it is rather a path with a mistake in it."""
    folder, _, name = source.partition("/")
    if folder not in ("", ".", "..") and name and "/" not in name and Path(folder).is_dir():
        warn(f"There is a folder {folder} here, but no {name} in it: looking for {source} on the hub.")
