"""What the processor of a run is told, wherever it makes inputs: of training, of keep sets, and of exams."""

from __future__ import annotations

from pathlib import Path


def processor_settings(processor_kwargs: dict | None, chat_template_path: str | None) -> dict:
    """The recipe's processor_kwargs, and its chat template among them."""
    settings = {**(processor_kwargs or {})}
    if chat_template_path is not None:
        settings["chat_template"] = Path(chat_template_path).read_text(encoding="utf-8")
    return settings
