"""The files of a tokenizer and of chat templates in a folder, which go together."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .schema import ChatTemplate, check, read_json

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
TOKENIZER += ("special_tokens_map.json", "added_tokens.json")
# Before version 5, transformers kept a template in tokenizer_config.json, and a processor's in chat_template.json.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
CONFIG = "tokenizer_config.json"
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\.\w+|.+\.(?:model|tiktoken)")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary. Without such a file, transformers makes an empty tokenizer for some models."""
    return any(_VOCABULARY.fullmatch(file.name) for file in folder.iterdir())


def chat_templates(folder: Path) -> set[str]:
    """The templates of the folder's tokenizer and processor. ValueError if a file of theirs is no JSON."""
    templates = [file.read_text("utf-8", "replace") for file in _files(folder, TEMPLATES) if file.suffix == ".jinja"]
    for template in (_inside(folder / CONFIG), _inside(folder / "chat_template.json")):
        templates += [one["template"] for one in template] if isinstance(template, list) else [template or ""]
    return {text.strip() for text in templates} - {""}


def take_tokenizer(source: Path, folder: Path) -> None:
    """Put the source's tokenizer in the place of the folder's, as a whole: what stayed of the other would override it.

    The chat templates are a part of it. Where the source has none, the folder keeps its own.
    """
    kept, replaced = _inside(folder / CONFIG), TOKENIZER
    if chat_templates(source):
        kept, replaced = None, (*TOKENIZER, *TEMPLATES)
    for file in _files(folder, replaced):
        file.unlink()
    for file in _files(source, replaced):
        copied = folder / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
    if kept is not None:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        (folder / CONFIG).write_text(json.dumps({**config, "chat_template": kept}, indent=2), encoding="utf-8")


def _files(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _inside(file: Path) -> str | list[dict[str, str]] | None:
    """The chat template in a JSON file; several have names."""
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        return check(content, ChatTemplate).model_dump()["chat_template"]
    except ValueError as error:
        raise ValueError(f"{file} has a chat template of another form ({error}): save or fetch it again") from error
