"""`<output>.partial/`: where a result is written until it is complete; nothing half-written carries its name."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """An empty folder `<output>.partial/` beside the output. It is gone afterwards, whatever happened.

    Raises:
        FileNotFoundError: there is no folder to write the output into.
        OSError: that folder cannot be written to.
    """
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output {output} cannot be written: there is no folder {output.parent}")
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
    except OSError as error:
        raise OSError(f"output {output} cannot be written: {error.strerror}") from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
