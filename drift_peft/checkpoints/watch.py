"""Files that are read for minutes: are they still what they were?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class Watch:
    """Size and time of files as they were first seen.

    Args:
        source: what an error calls them.
        files: to be watched, of which some may not be there.
    """

    def __init__(self, source: str | Path, files: Iterable[Path] = ()):
        self.source = source
        self._seen: dict[Path, tuple[int, int] | None] = {}
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        for file in files:
            self._seen.setdefault(file, _state(file))

    def states(self) -> dict[Path, tuple[int, int]]:
        """File -> bytes and time of its last change, in nanoseconds, as first seen."""
        return {file: state for file, state in self._seen.items() if state is not None}

    def check(self, *files: Path) -> None:
        """ValueError if one of these files, or of all where none is named, is no longer as it was first seen."""
        for file in files or self._seen:
            if file in self._seen and _state(file) != self._seen[file]:
                raise ValueError(
                    f"{file} has changed while {self.source} was read, so that the result would be a mixture: run the "
                    "same again when nobody writes there"
                )


def _state(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
