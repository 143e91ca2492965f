"""Finished runs, one JSON line each, so that the study can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from drift_peft import __version__

from .methods import METHODS
from .run import DEFAULTS
from .worlds import WORLDS


def key_of(run: dict) -> str:
    return json.dumps(run, sort_keys=True)


@cache
def fingerprint(world: str) -> str:
    """Of the world's checkpoints: results of other ones must not stand beside each other."""
    made_of = WORLDS[world]
    folders = [made_of.base, made_of.vlm, made_of.expert, made_of.wrong, made_of.weak]
    files = [folder / "model.safetensors" for folder in folders if folder is not None]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def definition(method: str) -> str:
    """Of what a method is beside a run's settings: results of another one must not stand beside it either."""
    fixed = {key: value for key, value in vars(METHODS[method]).items() if key not in ("title", "grid", "like")}
    if fixed["kept"] is None:  # as it was before there was keeping
        del fixed["kept"]
    return hashlib.sha256(json.dumps([fixed, DEFAULTS], sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """The finished runs of a JSONL file: run -> result.

    Args:
        file: read if it is there; each finished run is appended.

    Raises:
        ValueError: a run belongs to other checkpoints than those that are here, or to another definition of its
            method, or a line is damaged.
    """

    def __init__(self, file: Path):
        self.file, self.results = file, {}
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        self.torn = bool(lines) and not lines[-1].endswith("\n")  # killed while it wrote
        if self.torn:
            lines.pop()
        self.whole = len("".join(lines).encode())
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                run, result, world, method = (entry[key] for key in ("run", "result", "checkpoints", "method"))
            except (ValueError, KeyError) as error:
                raise ValueError(f"line {number} of {file} is no finished run: remove it ({error})") from error
            if world != fingerprint(run["world"]):
                raise ValueError(
                    f"line {number} of {file} was measured on other checkpoints of the world {run['world']!r} than "
                    "those that are here: restore them, or give --out another folder"
                )
            if run["method"] not in METHODS or method != definition(run["method"]):
                raise ValueError(
                    f"line {number} of {file} was measured when the method {run['method']!r} was something else, or "
                    "still there: remove that method's lines, or give --out another folder"
                )
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
        made_of = {"checkpoints": fingerprint(run["world"]), "method": definition(run["method"])}
        entry = {"run": run, "result": result, **made_of, "version": __version__}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.torn:  # only now: who reads a running study's file changes nothing
            os.truncate(self.file, self.whole)
            self.torn = False
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, sort_keys=True) + "\n")
