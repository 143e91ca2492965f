"""Whether a path still holds what has answered: another model, prior or keep set may have been put there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .journal import Journal

# What decides a model's answers, beside its tokenizer. A result, a journal or a card in its folder does not.
DECIDING = ("*.safetensors", "*.bin", "*.index.json", "*config.json", "*.py", "chat_template*")
DECIDING += ("additional_chat_templates/*",)
ROLES = ("base", "expert", "reference", "prior", "keep")  # of what a recipe names


def stamp(folder: str | Path | None) -> str | None:
    """Another one when files have changed that decide the answers of what is in a local folder: those of an earlier
    model must not be taken for its."""
    if folder is None or not Path(folder).is_dir():
        return None
    from drift_peft.checkpoints import TOKENIZER

    files = {path for pattern in (*DECIDING, *TOKENIZER) for path in Path(folder).glob(pattern)}
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def hold(ledger: Journal, settings: dict) -> None:
    """Note what lies at the paths of a recipe, as soon as it is there: a prior and a keep set are made by the first
    run.

    Raises:
        ValueError: it is another one than what the ledger was begun with.
    """
    for role in ROLES:
        path = settings.get(role)
        if path is not None and Path(path).is_file():
            with open(path, "rb") as file:
                now = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            now = stamp(path)
        before = ledger.answers.get(line := f"content of {role}")
        if now is not None and before is None:
            ledger.add(line, {"path": path, "mark": now})
        elif now is not None and before["mark"] != now:
            message = f"{ledger.path} holds answers with another content of {role}, which is {path}"
            raise ValueError(f"{message}: put back what was there, or name another output")
