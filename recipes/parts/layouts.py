"""One sample in any common layout -> the messages and images that TRL takes.

What counts is the sample's own keys, so a file may mix layouts:

    messages or conversations    turns with role and content (OpenAI, and what TRL takes), or from and value (ShareGPT,
                                 LLaVA); content is a text, or parts of the types text, image and image_url
    question, problem or query   with answer, solution or response: a question and its answer

beside them `images` or `image`, one or a list. `<image>` in a text is a placeholder of the next of these images; where
no turn has one, the images come before the first question, as in TRL. An image is a path, bytes, a data: address, or
{"path", "bytes"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

PLACEHOLDER = "<image>"
TURNS, IMAGES = ("messages", "conversations", "conversation"), ("images", "image")
QUESTIONS, ANSWERS = ("question", "problem", "query"), ("answer", "solution", "response")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class BadSample(ValueError):
    """A sample that cannot be used, in one sentence; `reason` is the kind of fault, under which it is counted."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


def read_sample(sample: dict | str) -> tuple[list[dict], list, str]:
    """Messages in TRL's layout, the images in the order of their placeholders as they are given, and the layout's name.

    Args:
        sample: an object, or its JSON.

    Raises:
        BadSample: says what is wrong with it; the caller knows where it stands.
    """
    if isinstance(sample, str):
        try:
            sample = json.loads(sample)
        except ValueError as error:
            raise BadSample("broken JSON", f"is no valid JSON: {error}") from error
    if not isinstance(sample, dict):
        raise BadSample("unknown layout", f"is no sample but {str(sample)[:40]!r}: each has to be a JSON object")
    turns, layout = _turns(sample)
    given = _listed(next((sample[key] for key in IMAGES if sample.get(key) is not None), None))
    messages, found = [], []
    for role, content in turns:
        parts = [*_parts(content)]
        if role != "user" and any(kind == "image" for kind, _ in parts):
            raise BadSample("placeholders != images", f"has an image in a turn of the {role}: take {PLACEHOLDER} out")
        found += [value for kind, value in parts if kind == "image"]
        messages.append((role, parts))
    _check_turns(messages)
    if not found and given:  # nobody said where
        found = [None] * len(given)
        first = next(parts for role, parts in messages if role == "user")
        first[:0] = [("image", None)] * len(given)
    open_places = found.count(None)
    if open_places != len(given):
        numbers = f"{_count(open_places, 'placeholder')} for {_count(len(given), 'image')}"
        raise BadSample("placeholders != images", f"has {numbers}: give each image its {PLACEHOLDER}")
    given = iter(given)
    images = [next(given) if value is None else value for value in found]
    return [{"role": role, "content": _content(parts)} for role, parts in messages], images, layout


def last_answer(messages: list[dict]) -> str:
    """The text of the last turn."""
    return "".join(part["text"] or "" for part in messages[-1]["content"])


def _turns(sample: dict) -> tuple[list[tuple[str, object]], str]:
    """(role, content) of each turn, and what the layout is called."""
    key = next((key for key in TURNS if sample.get(key)), None)
    if key is None:
        question = next((key for key in QUESTIONS if sample.get(key) is not None), None)
        answer = next((key for key in ANSWERS if sample.get(key) is not None), None)
        if question is None or answer is None:
            raise BadSample(
                "unknown layout",
                f"has {', '.join(key for key in sample if sample[key] is not None) or 'nothing'}: name its turns "
                f"{' or '.join(TURNS[:2])}, or its question and answer so",
            )
        return [("user", str(sample[question])), ("assistant", str(sample[answer]))], f"{question}, {answer}"
    turns = sample[key]
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)  # parquet files hold them so
        except ValueError:
            turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("unknown layout", f"has {key} that are no list of turns: each is an object of role and content")
    names = ("from", "value") if turns and turns[0].get("from") is not None else ("role", "content")
    named = []
    if isinstance(sample.get("system"), str) and sample["system"].strip():
        named.append(("system", sample["system"]))
    for turn in turns:
        role = turn.get(names[0])
        if role not in ROLES:
            raise BadSample("unknown layout", f"has a turn whose {names[0]} is {role!r}: one of {', '.join(ROLES)}")
        named.append((ROLES[role], turn.get(names[1])))
    return named, f"{key} ({', '.join(names)})"


def _parts(content) -> Iterator[tuple[str, object]]:
    """("text", text) and ("image", its value or None) in order."""
    if content is None:
        return
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample("unknown layout", f"has a turn that says {str(content)[:40]!r}: a text or a list of parts")
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "text" and isinstance(part.get("text"), str):
            for i, text in enumerate(part["text"].split(PLACEHOLDER)):
                if i:
                    yield "image", None
                if text:
                    yield "text", text
        elif kind in ("image", "image_url"):
            value = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            yield "image", value["url"] if isinstance(value, dict) and "url" in value else value
        else:
            raise BadSample("unknown layout", f"has a part of type {kind!r}: text, image or image_url")


def _content(parts: list[tuple[str, object]]) -> list[dict]:
    """Parts as TRL takes them. White space around an image goes: chat templates set it as the model knows it."""
    content = []
    for i, (kind, value) in enumerate(parts):
        if kind == "image":
            content.append({"type": "image", "text": None})
            continue
        if i and parts[i - 1][0] == "image":
            value = value.lstrip()
        if i + 1 < len(parts) and parts[i + 1][0] == "image":
            value = value.rstrip()
        if value:
            content.append({"type": "text", "text": value})
    return content


def _check_turns(messages: list[tuple[str, list]]) -> None:
    roles = [role for role, _ in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadSample(
            "roles out of order",
            f"has the turns {', '.join(roles) or 'of nobody'}: user and assistant by turns, the assistant last, and "
            "no system but at the start",
        )
    for role, parts in messages:
        if not any(kind == "image" or value.strip() for kind, value in parts):
            raise BadSample(
                f"empty {'answer' if role == 'assistant' else 'question'}",
                f"has a turn of the {role} that says nothing",
            )


def _listed(value) -> list:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
