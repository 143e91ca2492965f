"""What the processor of a run is told, wherever it makes inputs: of training, of keep sets, and of exams."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def check_chat_template(path: str | None) -> None:
    """ValueError unless it is None or a file with a chat template."""
    if path is not None and not (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
        way_out = "a model's folder has one, chat_template.jinja"
        raise ValueError(f"chat_template_path={path} is no .jinja file that is here: name one; {way_out}")


def check_tokens(processor: Any, **named: str | None) -> None:
    """ValueError for a token of the settings that the tokenizer does not have."""
    for name, token in named.items():
        if token is not None and token not in processor.tokenizer.get_vocab():
            raise ValueError(f"{name}={token} is none of the base's tokens: name one, or leave it out")


def processor_settings(processor_kwargs: dict | None, chat_template_path: str | None) -> dict:
    """The recipe's processor_kwargs, and its chat template among them."""
    settings = {**(processor_kwargs or {})}
    if chat_template_path is not None:
        settings["chat_template"] = Path(chat_template_path).read_text(encoding="utf-8")
    return settings


def load_processor(name: str | Path, revision: str | None, settings: dict, trust_remote_code: bool) -> Any:
    """That of a base, with `processor_settings`. ValueError for a setting that it does not know, or if it takes no
    images."""
    from transformers import AutoProcessor

    from drift_peft.keeping import check_processor_settings

    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **settings)
    if getattr(processor, "image_processor", None) is None:
        kind = type(processor).__name__
        raise ValueError(f"{name} has no processor of images but {kind}: name a vision-language model as the base")
    check_processor_settings(processor, settings)
    return processor
