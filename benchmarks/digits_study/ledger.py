"""The study's ledger, which refuses runs of other checkpoints and of other definitions of a method."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from ledger import Ledger as Lines

from .methods import METHODS
from .run import DEFAULTS
from .worlds import WORLDS


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
    beside = ("title", "grid", "like", "chosen_by")
    fixed = {key: value for key, value in vars(METHODS[method]).items() if key not in beside}
    if fixed["kept"] is None:  # as it was before there was keeping
        del fixed["kept"]
    return hashlib.sha256(json.dumps([fixed, DEFAULTS], sort_keys=True).encode()).hexdigest()[:16]


class Ledger(Lines):
    """The finished runs of the study."""

    def __init__(self, file: Path):
        super().__init__(file, made_of, stale)


def made_of(run: dict) -> dict:
    return {"checkpoints": fingerprint(run["world"]), "method": definition(run["method"])}


def stale(run: dict, entry: dict) -> str | None:
    if entry["checkpoints"] != fingerprint(run["world"]):
        return f"on other checkpoints of the world {run['world']!r} than those that are here: restore them"
    if run["method"] not in METHODS or entry["method"] != definition(run["method"]):
        return f"when the method {run['method']!r} was something else, or still there: remove that method's lines"
    return None
