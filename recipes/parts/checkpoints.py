"""The checkpoints of a run: which are whole, and so what training can go on from; and whether it came to its end."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"  # what Trainer writes last
TORCH = (".pt", ".pth", ".bin")  # zip files, whose table of contents is their end


def checkpoints(output: str | Path) -> list[Path]:
    """The folders `checkpoint-N`, by N."""
    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output).glob("checkpoint-*")}
    return sorted(
        (path for path, n in numbered.items() if n and path.is_dir()), key=lambda path: int(numbered[path][1])
    )


def newest_whole(output: str | Path) -> Path | None:
    return next(filter(is_whole, reversed(checkpoints(output))), None)


def is_whole(checkpoint: Path) -> bool:
    """Was it written to its end? What a kill or a full disk has cut short is not read to find out."""
    try:
        steps_of(checkpoint)
        files = [file for file in checkpoint.iterdir() if file.is_file()]
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in TORCH and not zipfile.is_zipfile(file):
                return False
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    goes_on = {"optimizer.pt", "scheduler.pt"} <= {file.name for file in files}  # else Trainer begins both anew
    return goes_on and any(file.suffix == ".safetensors" for file in files)


def steps_of(checkpoint: Path) -> int:
    """How many steps it has behind it."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]


def earlier_record(output: str | Path) -> dict | None:
    """run.json of a run that came to its end."""
    try:
        record = json.loads((Path(output) / "run.json").read_text(encoding="utf-8"))
        return record if {"settings", "results"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None
