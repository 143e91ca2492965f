"""Reasoning chains with pictures in files of every kind, and what recipes/parts/loading.py reads from them."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts.loading import load_messages
from PIL import Image
from tiny_vlm import CHAT, PROCESSORS, tokenizer

ANSWER = r"<think> 2 + 3 = 5 </think> \boxed{5}"
IMAGE, BOXED = {"type": "image", "text": None}, {"type": "text", "text": ANSWER}


def text(words):
    return {"type": "text", "text": words}


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(256, size=(12, 10 + i, 3), dtype=np.uint8))


def encoded(i, format="PNG"):
    content = io.BytesIO()
    picture(i).save(content, format=format)
    return content.getvalue()


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The working folder, with the pictures 0.png to 2.png in `images`; datasets caches in this test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(encoded(i))
    monkeypatch.chdir(tmp_path / "set")
    return tmp_path / "set"


def turns(question="<image>\nhow many?", answer=ANSWER, names=("role", "content"), roles=("user", "assistant")):
    return [{names[0]: role, names[1]: said} for role, said in zip(roles, (question, answer), strict=True)]


def save(rows, name):
    """Write rows as the kind of file that its name says."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
    elif name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Path(name).write_text(json.dumps(rows, indent=1))
    return name


def load(source, **options):
    """The samples and what was dropped, the same with streaming, whose counts do not grow when it is read again."""
    dataset, dropped = load_messages(source, **options)
    stream, dropped_of_stream = load_messages(source, streaming=True, **options)
    assert isinstance(stream, datasets.IterableDataset) and not dropped_of_stream
    samples, streamed = [*dataset], [*stream]
    assert len([*stream]) == len(streamed)
    assert (dict(dropped), dropped.layouts) == (dict(dropped_of_stream), dropped_of_stream.layouts)
    assert set(dropped.sentences) == set(dropped_of_stream.sentences)
    assert dataset.column_names == list(samples[0] if samples else dataset.features) == ["messages", "images"]
    assert [sample["messages"] for sample in samples] == [sample["messages"] for sample in streamed]
    assert [pixels(sample) for sample in samples] == [pixels(sample) for sample in streamed]
    return samples, dropped


def pixels(sample):
    assert all(image.mode == "RGB" for image in sample["images"])
    return [np.asarray(image).tolist() for image in sample["images"]]


def pictures(*numbers):
    return [np.asarray(picture(i)).tolist() for i in numbers]


ONE = [{"role": "user", "content": [IMAGE, text("how many?")]}, {"role": "assistant", "content": [BOXED]}]


def processor(family="llava_next"):
    make, image = PROCESSORS[family]
    return make(tokenizer(), chat_template=CHAT.replace("IMAGE", image))
