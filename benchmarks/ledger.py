"""Finished runs, one JSON line each, so that a study can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from drift_peft import __version__


def key_of(run: dict) -> str:
    return json.dumps(run, sort_keys=True)


class Ledger:
    """The finished runs of a JSONL file: run -> result.

    Args:
        file: read if it is there; each finished run is appended.
        made_of: run -> what it was made of, such as fingerprints of its checkpoints and its method, kept beside it.
        stale: (run, what it was made of) -> why it must not stand beside others any more, or None.
        elsewhere: what a user gives to begin another file.

    Raises:
        ValueError: a run is stale, or a line is damaged.
    """

    def __init__(
        self,
        file: Path,
        made_of: Callable[[dict], dict],
        stale: Callable[[dict, dict], str | None],
        elsewhere: str = "--out another folder",
    ):
        self.file, self.made_of, self.results = file, made_of, {}
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        self.torn = bool(lines) and not lines[-1].endswith("\n")  # killed while it wrote
        if self.torn:
            lines.pop()
        self.whole = len("".join(lines).encode())
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                run, result, why = entry["run"], entry["result"], stale(entry["run"], entry)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {file} is no finished run: remove it ({error})") from error
            if why:
                raise ValueError(f"line {number} of {file} was measured {why}, or give {elsewhere}")
            self.results[key_of(run)] = result

    def __contains__(self, run: dict) -> bool:
        return key_of(run) in self.results

    def __getitem__(self, run: dict) -> dict:
        return self.results[key_of(run)]

    def __iter__(self) -> Iterator[dict]:
        return map(json.loads, self.results)

    def __len__(self) -> int:
        return len(self.results)

    def add(self, run: dict, result: dict) -> None:
        self.results[key_of(run)] = result
        entry = {"run": run, "result": result, **self.made_of(run), "version": __version__}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.torn:  # only now: who reads a running study's file changes nothing
            os.truncate(self.file, self.whole)
            self.torn = False
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, sort_keys=True) + "\n")
