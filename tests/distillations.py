"""Runs of recipes/distill.py on a few sums: the questions, a server's right answers, and what was written."""

import json
import random

import distill
import pytest
from parts.journal import journal_path
from parts.loading import load_messages
from PIL import Image


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Backoff in hundredths of its seconds; caches of this test's own."""
    uniform = random.uniform
    monkeypatch.setattr(random, "uniform", lambda low, high: uniform(low, high) / 100)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save_questions(folder, count):
    """Sums with their answers; returns the file. Question i is `what is i + 1 ?`, its image i pixels wider than 8."""
    lines = []
    for i in range(count):
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"problem": f"<image>what is {i} + 1 ?", "answer": str(i + 1), "image": f"{i}.png"}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def number(question):
    return int(question.split("what is ")[1].split(" + ")[0])


def right(question):
    i = number(question)
    return rf"<think> {i} and one more </think> \boxed{{{i + 1}}}"


def run(source, output, server, *flags, capsys=None):
    """main(); the funnel where capsys is given."""
    flags = ["--server", server.url, "--model", "teacher", "--timeout", "1", "--retries", "3", "--json", *flags]
    distill.main([str(source), "-o", str(output), *flags])
    return json.loads(capsys.readouterr().out) if capsys else None


def result(output):
    """Question number -> answer, of a written file, each of whose samples has to be whole."""
    dataset, dropped = load_messages(output, boxed=True)
    assert not dropped
    found = {}
    for sample in dataset:
        question, answer = (
            [part["text"] for part in turn["content"] if part["type"] == "text"] for turn in sample["messages"]
        )
        i = number(question[0])
        assert question == [f"what is {i} + 1 ?"] and sample["messages"][0]["content"][0]["type"] == "image"
        assert [image.size for image in sample["images"]] == [(8 + i, 8)]
        assert i not in found
        (found[i],) = answer
    return found


def journal_lines(output):
    return [json.loads(line) for line in journal_path(output).read_text().splitlines()]
