"""The files of a tokenizer and of chat templates in a folder, which go together."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .schema import ChatTemplate, check, read_json

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "tekken.json")
TOKENIZER += ("special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# Before version 5, transformers kept templates in these, and a processor's in chat_template.json.
TEMPLATES_INSIDE = ("tokenizer_config.json", "processor_config.json")
_VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|vocab\.\w+|.+\.(?:model|tiktoken)")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary. Without such a file, transformers makes an empty tokenizer for some models."""
    return any(_VOCABULARY.fullmatch(file.name) for file in folder.iterdir())


def chat_templates(folder: Path) -> set[str]:
    """The templates of the folder's tokenizer and processor, with \\n at the end of a line. ValueError if a file of
    theirs cannot be read."""
    templates = [file.read_text("utf-8", "replace") for file in _files(folder, TEMPLATES) if file.suffix == ".jinja"]
    for template in (_inside(folder / name) for name in (*TEMPLATES_INSIDE, "chat_template.json")):
        if isinstance(template, dict):
            templates += template.values()
        else:
            templates += [one["template"] for one in template] if isinstance(template, list) else [template or ""]
    return {text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in templates} - {""}


def take_tokenizer(source: Path, folder: Path) -> None:
    """Put the source's tokenizer in the place of the folder's, as a whole: what stayed of the other would override it.

    The chat templates are a part of it. Where the source has none but the folder's, the folder keeps its own.
    """
    owner, replaced = folder, TOKENIZER
    if not chat_templates(source) <= chat_templates(folder):
        owner, replaced = source, (*TOKENIZER, *TEMPLATES)
    inside = {name: _inside(owner / name) for name in TEMPLATES_INSIDE}
    for file in _files(folder, replaced):
        file.unlink()
    for file in _files(source, replaced):
        copied = folder / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
    for name, template in inside.items():
        if _inside(folder / name) != template:
            config = read_json(folder / name) if (folder / name).is_file() else {}
            config = {key: value for key, value in config.items() if key != "chat_template"}
            config |= {} if template is None else {"chat_template": template}
            (folder / name).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _files(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _inside(file: Path) -> str | list[dict[str, str]] | dict[str, str] | None:
    """The chat template in a JSON file; several have names."""
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        return check(content, ChatTemplate).model_dump()["chat_template"]
    except ValueError as error:
        raise ValueError(f"{file} has a chat template of another form ({error}): save or fetch it again") from error
