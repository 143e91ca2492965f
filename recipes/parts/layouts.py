"""One sample in any common layout -> the messages and images that TRL takes.

What counts is the sample's own keys, so a file may mix layouts; LAYOUTS has a row of each. `<image>` in a text is a
placeholder of the next image; where no turn has one, the images come before the first question, as in TRL. An image is
a path, bytes, a data: address, or {"path", "bytes"}. A chain of thought that stands beside an answer is put before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from drift_peft.choices import PICTURES

from .bad_sample import BadSample, printable
from .images import Root, is_another, pictures_in
from .questions import THOUGHTS, read_instruction, read_question, with_chain

LAYOUTS = r"""
turns, as OpenAI and TRL have them; beside them images or image, one or a list
  {"messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "5"}], "images": ["1.png"]}
turns in parts, with the chain of thought in reasoning_content, reasoning or thinking, as servers give it
  {"messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "How many?"}]}, {"role": "assistant", "reasoning_content": "2 + 3 = 5", "content": "5"}]}
turns, as ShareGPT and LLaVA have them
  {"conversations": [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "5"}], "image": "1.png"}
prompt and completion, as TRL has them: texts, or turns in both
  {"prompt": "<image>How many?", "completion": "5", "image": "1.png"}
question, problem or query, and answer, solution or response
  {"question": "How many?", "answer": "5", "image": "1.png"}
instruction, input or none, and output, as Alpaca has them
  {"instruction": "How many?", "input": "", "output": "5", "image": "1.png"}
question and answer with how it is solved: trained are both, and evaluated is the answer
  {"problem": "How many?", "solution": "2 + 3 = 5", "answer": "5", "image": "1.png"}
the same with options or choices; the answer is a letter, a text, or an index, from 0 on
  {"question": "How many?", "options": ["4", "5"], "answer": 1, "image": "1.png"}
""".strip()  # noqa: E501
PLACEHOLDER = "<image>"
FOREIGN = re.compile(r"<(?:video|audio)>|<image[ _-]?\d+>")
TURNS, IMAGES = ("messages", "conversations", "conversation"), ("images", "image")
SIBLING = re.compile(r"images?[_-]?\d+")  # of several images with a key each
FILE_NAME = "file_name"  # of a picture, in the metadata.jsonl beside a folder of them, as datasets has it
UNANSWERED = "its last turn has no answer: left out"
PAIR = ("prompt", "completion")
OTHERS = ("videos", "video", "audios", "audio")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"system": "system", "developer": "system"}  # the later name


class Sample(NamedTuple):
    """A sample that was read.

    Attributes:
        messages: in TRL's layout.
        images: in the order of their placeholders, as they are given.
        layout: the keys that were read.
        unread: keys that hold text or bytes too -> how these begin.
        noted: what was done to it.
    """

    messages: list[dict]
    images: list
    layout: str
    unread: dict[str, str]
    noted: list[str]


def read_sample(sample: dict | str, chains: bool = True, root: Root | None = None) -> Sample:
    """Whatever a sample holds.

    Args:
        sample: an object, or its JSON.
        chains: put the chain of thought that stands beside an answer before it; else the last turn is the answer.
        root: where its images are looked for, to tell the name of one from other text.

    Raises:
        BadSample: says what is wrong with it; the caller knows where it stands.
    """
    if isinstance(sample, str):
        try:
            sample = json.loads(sample)
        except (ValueError, RecursionError) as error:
            raise BadSample("broken JSON", f"is no valid JSON: {error}") from error
    if not isinstance(sample, dict):
        raise BadSample("unknown layout", f"is no sample but {str(sample)[:40]!r}: each has to be a JSON object")
    other = next((key for key in OTHERS if sample.get(key)), None)
    if other:
        raise BadSample("video or audio", f"has {other}, which are not read: take samples of images and text")
    turns, layout, read, unread = _turns(sample, chains)
    messages, found = [], []
    for role, content in turns:
        parts = [*_parts(content)]
        _check_text(role, parts)
        if role != "user" and any(kind == "image" for kind, _ in parts):
            raise BadSample("placeholders != images", f"has an image in a turn of the {role}: take {PLACEHOLDER} out")
        found += [value for kind, value in parts if kind == "image"]
        messages.append((role, parts))
    named = [key for key in IMAGES if _listed(sample.get(key))]
    if not named and found.count(None) == len(found) and str(sample.get(FILE_NAME)).lower().endswith(PICTURES):
        named = [FILE_NAME]
    pictures = next(iter(named), None)
    given = _listed(sample.get(pictures))
    noted = []
    if [role for role, _ in messages[-2:]] == ["assistant", "user"] and all(
        kind == "text" for kind, _ in messages[-1][1]
    ):
        noted = [UNANSWERED]
        messages.pop()
    _check_turns(messages)
    if not found and given:  # nobody said where
        found = [None] * len(given)
        first = next(parts for role, parts in messages if role == "user")
        first[:0] = [("image", None)] * len(given)
    open_places = found.count(None)
    if open_places != len(given):
        numbers = f"{_count(open_places, 'placeholder')} for {_count(len(given), 'image')}"
        way = f"give each image its {PLACEHOLDER}"
        if not given:
            way = f"add the image, or take {PLACEHOLDER} out of the text"
        raise BadSample("placeholders != images", f"has {numbers}: {way}")
    given = iter(given)
    images = [next(given) if value is None else value for value in found]
    used = {*read, pictures, "system"}
    unread |= {key: value for key, value in sample.items() if key not in used and _says(value)}
    for key, value in unread.items():
        if images and not SIBLING.fullmatch(key):
            continue  # a mask, the original, or its name elsewhere: the question goes with what was read
        if any(is_another(picture, images) for picture in pictures_in(value, key, root)):
            told = f"has an image under {printable(key)}, which is not read"
            raise BadSample("image not read", f"{told}: put all images of a sample under {IMAGES[0]}, or take it out")
    unread = {key: _begin(value) for key, value in unread.items()}
    turned = [{"role": role, "content": _content(parts)} for role, parts in messages]
    return Sample(turned, images, layout, unread, noted)


def last_answer(messages: list[dict]) -> str:
    """The text of the last turn."""
    return "".join(part["text"] or "" for part in messages[-1]["content"])


def _turns(sample: dict, chains: bool) -> tuple[list[tuple[str, object]], str, list[str], dict[str, object]]:
    """(role, content) of each turn, what the layout is called, the keys that were read, and what turns hold beside."""
    system = sample.get("system")
    if system is not None and not isinstance(system, str):
        raise BadSample("unknown layout", f"has a system that is {str(system)[:40]!r}: a text")
    start = [("system", system)] if system and system.strip() else []
    key = next((key for key in TURNS if sample.get(key)), None)
    turns, read = sample.get(key), [key]
    found = read_question(sample) if key is None else None
    if key is None and found is None and all(sample.get(name) for name in PAIR):
        key, read = ", ".join(PAIR), [*PAIR]
        turns = [*_spoken(sample["prompt"], "user"), *_spoken(sample["completion"], "assistant")]
    elif key is None:
        found = found or read_instruction(sample)
        if found is None:
            raise BadSample(
                "unknown layout",
                f"has {', '.join(key for key in sample if sample[key] is not None) or 'nothing'}: name its turns "
                f"{' or '.join(TURNS[:2])}, or its question and answer so",
            )
        question, chain, answer, read = found
        answer = with_chain(chain, answer) if chains and answer.strip() else answer
        return [*start, ("user", question), ("assistant", answer)], ", ".join(read), read, {}
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)  # parquet files hold them so
        except (ValueError, RecursionError):
            turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("unknown layout", f"has {key} that are no list of turns: each is an object of role and content")
    names = ("from", "value") if turns and turns[0].get("from") is not None else ("role", "content")
    named, unread = start, {}
    for turn in turns:
        role, content = turn.get(names[0]), turn.get(names[1])
        if not isinstance(role, str) or role not in ROLES:
            raise BadSample("unknown layout", f"has a turn whose {names[0]} is {role!r}: one of {', '.join(ROLES)}")
        thought = next((name for name in THOUGHTS if turn.get(name)), None)
        if thought and (chains or turn is not turns[-1]):
            content = _after(turn[thought], content, thought)
        named.append((ROLES[role], content))
        used = {*names, thought}
        beside = {f"{key}[].{name}": said for name, said in turn.items() if name not in used and _says(said)}
        unread |= {name: said for name, said in beside.items() if not pictures_in(unread.get(name), name)}
    return named, f"{key} ({', '.join(names)})", read, unread


def _spoken(said, role: str) -> list:
    """The turns of a prompt or a completion, which may be one text."""
    return [{"role": role, "content": said}] if isinstance(said, str) else [*said] if isinstance(said, list) else [said]


def _after(chain, content, name: str):
    """An answer with its chain of thought before it. One without words stays empty, and the sample is dropped."""
    if not isinstance(chain, str):
        raise BadSample("unknown layout", f"has a turn whose {name} is {str(chain)[:40]!r}: a text")
    parts = [*_parts(content)]
    if any(kind != "text" for kind, _ in parts):
        return content
    answer = "".join(text for _, text in parts)
    return with_chain(chain, answer) if answer.strip() else answer


def _parts(content) -> Iterator[tuple[str, object]]:
    """("text", text) and ("image", its value or None) in order."""
    if content is None:
        return
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        content = str(content)
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


def _check_text(role: str, parts: list[tuple[str, object]]) -> None:
    for text in (value for kind, value in parts if kind == "text"):
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise BadSample("broken text", f"has half a sign in its text, a lone surrogate: …{_around(text)}…")
        foreign = FOREIGN.search(text) if role == "user" else None
        if foreign and "image" in foreign[0]:
            raise BadSample("placeholders != images", f"has a placeholder {foreign[0]}: write {PLACEHOLDER}")
        if foreign:
            raise BadSample("video or audio", f"has a placeholder {foreign[0]}: take samples of images and text")


def _around(text: str) -> str:
    place = next(i for i, sign in enumerate(text) if "\ud800" <= sign <= "\udfff")
    return text[max(place - 10, 0) : place + 10]


def _says(value) -> bool:
    """Whether a value holds text, or bytes."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (dict, list)):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def _begin(value) -> str:
    return printable(str(value)[:40])


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
