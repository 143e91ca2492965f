"""A sample of a question and its answer, with the options to choose from and the chain of thought beside them."""

from __future__ import annotations

import ast
import json
import re
import string

from .bad_sample import BadSample
from .options import read_options

QUESTIONS, ANSWERS = ("question", "problem", "query"), ("answer", "solution", "response")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # in a turn: DeepSeek and vLLM, vLLM, Ollama and Anthropic
CHAINS = (*THOUGHTS, "rationale", "chain_of_thought", "cot")  # beside a question
TASK, INPUT, OUTPUT = "instruction", "input", "output"  # of Alpaca
OPTIONS = ("options", "choices")
OPTION = re.compile(r"(?:(?:option|choice)_?)?([A-J])|(?:option|choice)_([a-j])")  # a column of its own


def read_question(sample: dict) -> tuple[str, str, str, list[str]] | None:
    """Question with its options, chain of thought, answer, and the keys that these stand under; None if it has none.

    Of `answer`, `solution` and `response`, the first is the answer; another one beside it is how it was found.
    """
    texts = {key: _text(sample[key], key) for key in (*QUESTIONS, *ANSWERS, *CHAINS) if sample.get(key) is not None}
    questions = [key for key in QUESTIONS if key in texts]
    answers = [key for key in ANSWERS if key in texts]
    if not questions or not answers:
        return None
    answer, *others = [key for key in answers if texts[key].strip()] or answers[:1]
    chain = next((key for key in (*CHAINS, *reversed(others)) if texts.get(key, "").strip()), None)
    question, answer_text = texts[questions[0]], texts[answer]
    options, columns, numbers = _options(sample)
    if options:
        answer_text = _choice(sample[answer], answer_text, options, numbers)
        if len(read_options(question)) < 2:
            question = "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])
    read = [questions[0], *columns, *([chain] if chain else []), answer]
    return question, texts[chain] if chain else "", answer_text, read


def read_instruction(sample: dict) -> tuple[str, str, str, list[str]] | None:
    """The same of a sample in Alpaca's layout; None if it is in another one, or says a question or an answer too."""
    there = {key for key in (*QUESTIONS, *ANSWERS, TASK, OUTPUT) if sample.get(key) is not None}
    if there != {TASK, OUTPUT}:
        return None
    chain = next((key for key in CHAINS if sample.get(key) is not None and _text(sample[key], key).strip()), None)
    given = [key for key in (TASK, INPUT) if sample.get(key) not in (None, "")]
    read = [*given, *([chain] if chain else []), OUTPUT]
    asked = "\n".join(_text(sample[key], key) for key in given)
    return asked, _text(sample[chain], chain) if chain else "", _text(sample[OUTPUT], OUTPUT), read


def with_chain(chain: str, answer: str) -> str:
    """What is trained: the chain in <think> tags and the answer, or what says both already."""
    chain, answer = chain.strip(), answer.strip()
    if chain in answer or _bare(chain) == _bare(answer):
        return answer
    if "</think>" in answer:
        raise BadSample("two chains of thought", "has a chain of thought in its answer and another one beside it")
    inside, _, after = chain.removeprefix("<think>").partition("</think>")
    if after.strip():  # a whole response
        return chain if _bare(answer) in after else f"{chain}\n\n{answer}"
    return f"<think>\n{inside.strip()}\n</think>\n\n{answer}"


def _bare(answer: str) -> str:
    """An answer without the signs that data sets put around it."""
    match = re.fullmatch(r"<answer>(.*)</answer>|\$*\\boxed\{(.*)\}\$*|####(.*)", answer.strip(), re.S)
    return next(filter(None, match.groups()), "").strip() if match else answer.strip()


def _text(value, key: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise BadSample("unknown layout", f"has {key} that is {str(value)[:40]!r}: a text or a number")
    return str(value)


def _options(sample: dict) -> tuple[dict[str, str], list[str], bool]:
    """Letter -> text of what there is to choose from, the keys that it stands under, and whether it is numbers."""
    key = next((key for key in OPTIONS if sample.get(key)), None)
    if key is None:
        columns = {"".join(filter(None, match.groups())).upper(): name
                   for name in sample if sample[name] is not None and (match := OPTION.fullmatch(name))}  # fmt: skip
        values = {letter: sample[columns[letter]] for letter in sorted(columns)}
    else:
        values, columns = _listed(sample[key], key), {"": key}
    if len(values) < 2 or [*values] != [*string.ascii_uppercase[: len(values)]]:
        if key is None or not values:
            return {}, [], False  # a column that happens to be called A, or a question without a choice
        raise BadSample("unknown options", f"has {key} that are {str(sample[key])[:40]!r}: two at least, from A on")
    texts = {letter: _text(value, f"option {letter}").strip() for letter, value in values.items()}
    marks = {letter: re.match(rf"\(?{letter}[.):]\s*(?=\S)", text) for letter, text in texts.items()}
    if all(marks.values()):
        texts = {letter: text[marks[letter].end() :] for letter, text in texts.items()}
    return texts, [*columns.values()], not any(isinstance(value, str) for value in values.values())


def _listed(value, key: str) -> dict[str, object]:
    """Options in any of the forms that they have: a list, letter -> text, labels and texts, or one of these as text."""
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                parsed = read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, (list, dict)):
                return _listed(parsed, key)
        return read_options(f"\n{value}") or dict(zip(string.ascii_uppercase, value.split("\n"), strict=False))
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, dict):
        return {str(letter).strip().upper(): text for letter, text in value.items() if text is not None}
    if not isinstance(value, list):
        raise BadSample("unknown options", f"has {key} that is {str(value)[:40]!r}: a list of texts")
    while value and value[-1] in (None, ""):  # rows of a table have as many as the longest
        value = value[:-1]
    return dict(zip(string.ascii_uppercase, value, strict=False))


def _choice(answer, answer_text: str, options: dict[str, str], numbers: bool) -> str:
    """An answer that is an option's index, from 0 on, as its letter; any other as it is.

    A number is no text: beside options that are texts, `1` is an index, even where one of them is "1".
    """
    text = answer_text.strip()
    index = int(text) if re.fullmatch(r"\d{1,3}", text) else answer
    known = text in options.values() and (numbers or isinstance(answer, str))
    letter = None
    if not isinstance(index, (str, bool)) and index in range(len(options)):
        letter = [*options][int(index)]
    if known and letter and options[letter] != text:
        raise BadSample(
            "ambiguous answer",
            f"has the answer {text}, which is the text of one option and the index of {letter}: write its letter",
        )
    if known or isinstance(index, (str, bool)):
        return answer_text
    if letter is None:
        raise BadSample(
            "answer is no option", f"has the answer {answer_text}, and {len(options)} options, counted from 0"
        )
    return letter
