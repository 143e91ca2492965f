"""A file is there when it is complete; until then it is what it was before."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(file: Path, text: str) -> None:
    write(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write(file: Path, how: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it. Where several processes write it, the last one's stays.

    Raises:
        OSError: it cannot be written, and nothing of it is left.
    """
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        how(unfinished)
        os.replace(unfinished, file)
    except Exception as error:
        raise OSError(f"{file} could not be written ({reason_of(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # which was the error, then
            unfinished.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
