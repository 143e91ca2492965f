"""Whether a path still holds what has answered: another model, prior or keep set may have been put there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from .journal import Journal

# What decides a model's answers, beside its tokenizer. A result, a journal or a card in its folder does not.
WEIGHTS = ("*.safetensors", "*model*.bin")  # but not training_args.bin
DECIDING = ("*.index.json", "*config.json", "*.py", "chat_template*", "additional_chat_templates/*")
PLACES_READ, READ = 64, 4096  # of each file of weights; bytes at each
ROLES = ("base", "expert", "reference", "prior", "keep")  # of what a recipe names


def stamp(folder: str | Path | None) -> str | None:
    """Another one when files have changed that decide the answers of what is in a local folder: those of an earlier
    model must not be taken for its. It is the same wherever the folder lies, and whenever it was written."""
    if folder is None or not Path(folder).is_dir():
        return None
    from drift_peft.checkpoints import TOKENIZER

    weights, others = (
        {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
        for patterns in (WEIGHTS, (*DECIDING, *TOKENIZER))
    )
    digest = hashlib.sha256(sampled(sorted(weights)).encode())
    for path in sorted(others):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def sampled(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and bytes here and there in files of weights. Reading all of them would take as long as
    loading."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1, size // PLACES_READ)):
                file.seek(place)
                digest.update(file.read(READ))
    return digest.hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_missing(made: str) -> bool:
    """Whether a prior or a keep set is yet to be made. Without the ending, it is a hub id."""
    return made.endswith(".safetensors") and not Path(made).exists()


def hold(ledger: Journal, settings: dict, made: Path | None = None) -> None:
    """Note what lies at the paths of a recipe, as soon as it is there: a prior and a keep set are made by the first
    run.

    Args:
        made: folder of what was made of them since they were last looked at.

    Raises:
        ValueError: it is another one than what the ledger was begun with. `made`, perhaps of the other, is deleted.
    """
    for role in ROLES:
        path = settings.get(role)
        if path is not None and Path(path).is_file():
            now = sha256_of_file(path)
        else:
            now = stamp(path)
        before = ledger.answers.get(line := f"content of {role}")
        if now is not None and before is None:
            ledger.add(line, {"path": path, "mark": now})
        elif now is not None and before["mark"] != now:
            message = f"{ledger.path} holds answers with another content of {role}, which is {path}"
            way_out = "put back what was there, or name another output"
            if made is not None:
                shutil.rmtree(made)
                way_out += f" ({made}, which may be made of the other, is deleted)"
            raise ValueError(f"{message}: {way_out}")
