"""What an interrupted run has already paid for: a file of one JSON line each, on the disk before the next is asked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal.jsonl")


def refuse_other_folder(folder: Path, journal: str, *patterns: str) -> None:
    """Raise ValueError where a folder cannot be written, or holds without this journal what is named as one of these
    patterns."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"output {folder} cannot be written: {place} is no folder, or not yours to write to")
    found = [file.name for pattern in patterns for file in folder.glob(pattern)]
    if found and not any(folder.glob(f"{journal}*")):  # or its lock, of a kill
        raise ValueError(f"output {folder} holds {found[0]}, and no {journal} to go on from: name another folder")


class Journal:
    """Answers by question, of which those of an earlier run of the same settings are there already.

    A last line that was torn when a run was killed is dropped. One process at a time writes; its threads may share it.

    Args:
        settings: name -> value of whatever makes an answer another one; the first line of the file.
        text: what each answer has in words; None where answers are of another kind.
        told: setting -> what a difference of it means, where its values are hashes.

    Raises:
        ValueError: the file is of other settings or damaged.
        OSError: another process is writing it, or nothing can be written there.
    """

    def __init__(
        self, path: Path, settings: dict, text: str | None = "response", told: Mapping[str, str] = MappingProxyType({})
    ):
        self.path, self.settings, self.text, self.told = path, settings, text, told
        self.answers: dict[str, dict] = {}
        self._file = None
        self._lock = threading.Lock()
        from drift_peft.checkpoints import only_writer  # which takes ten times as long to import as the rest here

        with contextlib.ExitStack() as stack:
            stack.enter_context(only_writer(path))
            self._read()
            self._held = stack.pop_all()  # until __exit__

    def begin(self) -> None:
        """Write the settings now, where work begins that belongs to them before there is an answer."""
        with self._lock:
            self._begin()

    def add(self, question: str, answer: dict) -> None:
        """Write an answer; the file is made with the first, if not before."""
        with self._lock:
            self._begin()
            self._write({"question": question, **answer})
            self.answers[question] = answer

    def _begin(self) -> None:
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)
        if not os.fstat(self._file.fileno()).st_size:
            self._write(self.settings)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        with self._held:
            if self._file is not None:
                self._file.close()

    def _write(self, line: dict) -> None:
        """All of a line or nothing: what follows half of one could not be read."""
        content, start = json.dumps(line).encode() + b"\n", os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, "no room for an answer", str(self.path))
            os.fsync(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                os.truncate(self.path, start)
            raise

    def _read(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(_check(json.loads(line), ["question", self.text] if number > 1 else []))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {self.path} is damaged ({error}): delete that line") from error
        if lines:
            _refuse_others(self.path, lines[0], json.loads(json.dumps(self.settings)), self.told)
        for answer in lines[1:]:
            self.answers.setdefault(answer.pop("question"), answer)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))


def _check(line, texts: list[str | None]) -> dict:
    """A line of the file: the settings, or an answer, which has these in words."""
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    if not all(isinstance(line.get(name), str) for name in texts if name is not None):
        raise ValueError(f"it has no {' with a '.join(filter(None, texts))}")
    return line


def _refuse_others(path: Path, before: dict, now: dict, told: Mapping[str, str]) -> None:
    differing = []
    for key in (key for key in before | now if before.get(key) != now.get(key)):
        values = before.get(key), now.get(key)
        differing.append(f"{key} ({told[key] if key in told and all(values) else '{}, now {}'.format(*values)})")
    if differing:
        way_out = "take the earlier ones, or name another output"
        raise ValueError(f"{path} holds answers of other settings: {', '.join(differing)}: {way_out}")
