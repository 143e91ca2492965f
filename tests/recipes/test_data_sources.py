"""recipes/data.py: files, folders and data sets on the hub as sources, and pictures of every kind."""

import base64
import json
import os
from pathlib import Path

import chain_files
import datasets
import numpy as np
import pytest
from chain_files import ONE, encoded, load, picture, pictures, pixels, save, turns
from datasets.fingerprint import Hasher
from filelock import FileLock
from hub import Hub
from huggingface_hub import HfFileSystem
from parts import held_out, sources
from parts.layouts import BadSample, read_sample
from parts.loading import TEXT, load_messages
from PIL import Image

folder = chain_files.folder  # fixture

GREY = np.linspace(0, 1, 120).reshape(10, 12)
BYTES = np.round(GREY * 255).astype(np.uint8)
CONVERTED = {  # name -> image, how it is saved, the grey values that are trained, what is counted
    "16 bits": (Image.fromarray((GREY * 65535).astype(np.uint16)), "PNG", BYTES, "more than 8 bits: scaled"),
    "16 bits of TIFF": (Image.fromarray((GREY * 65535).astype(np.uint16)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "32 bits": (Image.fromarray((GREY * 1e6 - 5e5).astype(np.int32)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "8 bits of 32": (Image.fromarray(BYTES.astype(np.int32)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "float to 1": (Image.fromarray(GREY.astype(np.float32)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "float to 255": (Image.fromarray(BYTES.astype(np.float32)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "float": (Image.fromarray((GREY * 9 - 3).astype(np.float32)), "TIFF", BYTES, "more than 8 bits: scaled"),
    "constant": (Image.new("F", (4, 3), 7e9), "TIFF", np.zeros((3, 4)), "more than 8 bits: scaled"),
    "transparent": (Image.merge("LA", [Image.new("L", (12, 10), 0), Image.fromarray(BYTES)]), "PNG", 255 - BYTES,
                    "transparent: on white"),
    "opaque": (Image.merge("RGBA", [Image.fromarray(BYTES)] * 3 + [Image.new("L", (12, 10), 255)]), "PNG", BYTES, None),
    "8 bits": (Image.fromarray(BYTES), "PNG", BYTES, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_is_trained_as_it_looks(kind, streaming):
    image, format, grey, counted = CONVERTED[kind]
    image.save("a.image", format=format)
    save([{"messages": turns(), "images": [{"bytes": None, "path": "a.image"}]}], "a.jsonl")
    dataset, dropped = load_messages("a.jsonl", streaming=streaming)
    for _ in range(2):  # a stream may be read again
        (sample,) = dataset
    assert not dropped and np.abs(np.asarray(sample["images"][0]) - np.asarray(grey, int)[..., None]).max() <= 1
    assert dropped.report()["noted"] == ({counted: 1} if counted else {})


def test_palettes_with_a_transparent_colour_and_images_of_several_frames():
    palette = Image.fromarray((BYTES > 127).astype(np.uint8) * 255).convert("P")
    palette.save("a.gif", transparency=palette.getpixel((0, 0)))
    frames = [picture(0), picture(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save("b.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("F", (4, 4), float("nan")).save("c.tiff")
    save([{"messages": turns(), "images": [name]} for name in ("a.gif", "b.webp", "c.tiff")], "a.jsonl")
    dataset, dropped = load_messages("a.jsonl")
    assert dropped.report()["noted"] == {"transparent: on white": 1, "several frames: the first": 1}
    assert dropped == {"image broken": 1} and "it has values that are no numbers" in dropped.first()["image broken"]
    assert (np.asarray(dataset[0]["images"][0]) == 255).all() and pixels(dataset[1]) == pictures(0)


def test_an_absolute_path_inside_the_folder_or_the_one_that_is_named(folder, tmp_path):
    save([{"messages": turns(), "images": [str(folder / "images" / "1.png")]}], "a.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    assert pixels(load("a.jsonl")[0][0]) == pictures(1)
    with pytest.raises(BadSample, match="outside of "):
        load_messages(tmp_path / "other" / "a.jsonl")
    assert pixels(load(tmp_path / "other" / "a.jsonl", images=tmp_path)[0][0]) == pictures(1)


def test_nothing_stays_in_the_cache_of_datasets(tmp_path, monkeypatch):
    """Neither of a process that ended, nor, after the next one, of a process that was killed."""
    ends = []
    monkeypatch.setattr("atexit.register", lambda *call: ends.append(call))
    sources.scratch.cache_clear()
    cache, alive = tmp_path / "cache", FileLock(tmp_path / "cache" / "recipes-alive.lock")
    for name in ("alive", "killed"):
        (cache / f"recipes-{name}").mkdir(parents=True)
        (cache / f"recipes-{name}.lock").touch()
    with alive:
        dataset, _ = load_messages(save([{"question": "a", "answer": "5"}], "a.jsonl"))
        mine = sources.scratch(cache)
        assert all(file["filename"].startswith(os.path.join(mine, "")) for file in dataset.cache_files)
        assert {path.name for path in cache.glob("recipes-*/")} == {"recipes-alive", Path(mine).name}
    for what, *arguments in ends:
        what(*arguments)
    sources.scratch.cache_clear()
    assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "recipes-alive.lock"]


def test_what_was_read_of_earlier_files_is_not_hashed_with_each(folder, monkeypatch):
    """Or a folder of many files takes the square of their number."""
    hashed, hash = [], Hasher.hash
    monkeypatch.setattr(Hasher, "hash", staticmethod(lambda value: hashed.append(value) or hash(value)))
    for i in range(2):
        save([{"question": f"{i}?", "answer": "5"}], f"train-{i}.jsonl")
    dataset, _ = load_messages(folder)
    assert len(dataset) == 2 and hashed
    assert not [value for value in hashed if getattr(value, "__closure__", None)]


def test_the_pictures_may_be_in_another_folder(folder, tmp_path):
    (folder / "images").rename(tmp_path / "elsewhere")
    save([{"messages": turns(), "images": ["1.png"]}], "a.jsonl")
    assert pixels(load("a.jsonl", images=tmp_path / "elsewhere")[0][0]) == pictures(1)
    with pytest.raises(ValueError, match=r"^images missing is no folder$"):
        load_messages("a.jsonl", images="missing")


def test_a_folder_of_files_has_splits_by_their_names(folder):
    (folder / "chains").mkdir()
    for name, question in (("train-0.json", "a"), ("train-1.jsonl", "b"), ("test.json", "c")):
        save([{"question": question, "answer": "5"}], f"chains/{name}")
    said = {
        split: [s["messages"][0]["content"][0]["text"] for s in load("chains", split=split)[0]]
        for split in ("train", "test")
    }
    assert said == {"train": ["a", "b"], "test": ["c"]}
    with pytest.raises(ValueError, match=r"^chains has no split validation: it has train, test$"):
        load_messages("chains", split="validation")


@pytest.mark.parametrize(
    ("source", "content", "sentence"),
    [("missing.jsonl", None, "there is no file missing.jsonl here: a path begins where"),
     ("a.csv", b"a,b", "a.csv is no file to be read: take one of .json"),
     ("a.jsonl", b"\xef\xbb\xbf \n", "a.jsonl cannot be read: it is empty"),
     ("a.jsonl", b"\xff\xfe{}", "a.jsonl cannot be read: it is not in UTF-8: convert it, as with iconv"),
     ("a.parquet", b"PAR1 torn", "a.parquet cannot be read: "),
     ("a.json", b'[{"question": "a", "answer', "a.json is no valid JSON: Unterminated string")],
)  # fmt: skip
def test_a_source_that_cannot_be_read_is_one_sentence(source, content, sentence, folder):
    if content is not None:
        (folder / source).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_messages(source)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"question": "a", "answer": "b"}', '{"question": "a",\n"answer": "b"}'])
def test_a_json_file_may_be_lines_or_one_sample(content, folder):
    (folder / "a.json").write_text(content + ("\n" + content if "\n" not in content else ""))
    samples, dropped = load("a.json")
    assert len(samples) == (1 if "\n" in content else 2) and not dropped


ROWS = [{"question": "a", "answer": "1.50"}, {"question": "b", "answer": "5"}]


@pytest.mark.parametrize(
    ("file", "content"),
    [("a.jsonl", json.dumps(ROWS)), ("b.jsonl", "\ufeff\n" + json.dumps(ROWS, indent=1)),
     ("a.JSONL", "\n".join(map(json.dumps, ROWS))), ("a.JSON", json.dumps(ROWS)),
     ("a.json", json.dumps({"data": ROWS})), ("b.json", json.dumps(dict(zip("12", ROWS, strict=True))))],
)  # fmt: skip
def test_what_holds_the_samples_may_be_another_one(file, content):
    Path(file).write_text(content, encoding="utf-8")
    dataset, dropped = load_messages(file)
    assert not dropped and [sample["messages"][1]["content"][0]["text"] for sample in dataset] == ["1.50", "5"]
    assert sources.read_categories(file, "train", "question") == ["a", "b"]


def test_a_torn_list_or_a_list_in_the_first_line_is_no_reason_to_lose_the_lines():
    lines = ["[1]", "[" * 5, *map(json.dumps, ROWS)]
    Path("a.jsonl").write_text("\n".join(lines))
    dataset, dropped = load_messages("a.jsonl")
    assert len(dataset) == 2 and dropped == {"unknown layout": 1, "broken JSON": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_has_written_is_read_where_it_lies(streaming, folder):
    rows = [{"question": "how many?", "answer": f"{i}", "image": picture(i)} for i in range(2)]
    features = datasets.Features({"question": TEXT, "answer": TEXT, "image": datasets.Image()})
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk("one", num_shards=2)
    datasets.DatasetDict({"train": saved, "dev": saved.select([1])}).save_to_disk("two")
    before = sorted(folder.rglob("*"))
    for source, split, numbers in (("one", "train", [0, 1]), ("two", "train", [0, 1]), ("two", "dev", [1])):
        dataset, _ = load_messages(source, split=split, streaming=streaming)
        assert [pixels(sample) for sample in dataset] == [pictures(i) for i in numbers]
    assert sources.read_categories("two", "dev", "answer") == ["1"]
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(ValueError, match=r"^two cannot be read: it has no split test, but train, dev$"):
        load_messages("two", split="test")


def test_a_split_of_what_has_none_is_refused(folder):
    """Except the one that is meant where nobody names one, and the one that save_to_disk has noted."""
    save(ROWS, "a.jsonl")
    saved = datasets.Dataset.from_list(ROWS, split="dev")
    saved.save_to_disk("one")
    datasets.DatasetDict({"dev": saved}).save_to_disk("two")
    for source in ("a.jsonl", "one"):
        way_out = "leave split out, or name the file or folder of that split as the data"
        with pytest.raises(
            ValueError, match=rf"^{source} has no splits, so split test cannot be taken of it: {way_out}$"
        ):
            load_messages(source, split="test")
        assert len(load_messages(source, split="test", default_split="test")[0]) == 2
        with pytest.raises(ValueError, match="so split train cannot be taken"):
            load_messages(source, split="train", default_split="test")
    assert len(load_messages("one", split="dev")[0]) == len(load_messages("two", split="dev")[0]) == 2


def test_a_file_beside_pictures_is_the_one_that_is_meant(folder):
    save([{"messages": turns(), "images": [f"{i}.png"]} for i in range(3)], "images/data.json")
    assert [pixels(sample) for sample in load("images")[0]] == [pictures(i) for i in range(3)]
    save(ROWS, "images/other.jsonl")
    told = (
        "which files of images are for train, their names do not say: name one of images/data.json, images/other.jsonl"
    )
    with pytest.raises(ValueError, match=told):
        load_messages("images")


def test_an_image_is_an_address_of_this_machine_or_bare_base64(folder):
    text = base64.b64encode(encoded(2)).decode()
    long, broken = f"{'a' * 500}.png", text[: len(text) // 8 * 4]
    images = [f"file://{folder}/images/1.png", text, "file:///etc/hostname", long, f"https://x.org/{long}", broken]
    save([{"messages": turns(), "images": [image]} for image in images], "a.jsonl")
    samples, dropped = load("a.jsonl")
    assert [pixels(sample) for sample in samples] == [pictures(1), pictures(2)]
    sentences = [*dropped.sentences]
    assert dropped == {"image outside its folder": 1, "image missing": 2, "image broken": 1}
    assert "names the image /etc/hostname, which is outside of" in sentences[0]
    assert f"names the image {'a' * 80}…, which is not there" in sentences[1] and max(map(len, sentences)) < 300
    with pytest.raises(BadSample, match="has an image under scan, which is not read"):
        read_sample({"question": "a", "answer": "5", "scan": text})


class DataSets:
    """The test's hub, for repositories of data."""

    def answer(self, body=b""):
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        super().answer(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.server.RequestHandlerClass = type("Handler", (DataSets, hub.server.RequestHandlerClass), {})
        hub.use(monkeypatch, tmp_path / "hub")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        HfFileSystem.clear_instance_cache()  # they have the endpoint of their making
        yield hub
        HfFileSystem.clear_instance_cache()


def test_a_hub_data_set_whose_paths_start_outside_of_it(hub):
    """As the published one: a JSON file, pictures beside it, and paths from the folder that holds the set."""
    rows = [{"messages": turns(), "images": [f"../chains/images/{i}.png"]} for i in (1, 9)]
    files = {"README.md": b"# chains\n", "train.json": json.dumps(rows).encode(), "images/1.png": encoded(1)}
    commit = hub.add("someone/chains", files, "v1")
    hub.add("someone/chains", {"README.md": b""})
    for streaming in (False, True):
        dataset, dropped = load_messages("someone/chains@v1", streaming=streaming)
        (sample,) = dataset
        assert sample["messages"] == ONE and pixels(sample) == pictures(1)
        assert dropped == {"image missing": 1}
        assert dropped.first()["image missing"].startswith(
            f"sample 2 of someone/chains@{commit}/train.json names the image "
        )
    with pytest.raises(ValueError, match=r"^someone/chains@v1 has no split test: it has train$"):
        load_messages("someone/chains@v1", split="test")
    with pytest.raises(ValueError, match=r"^someone/nothing cannot be read: "):
        load_messages("someone/nothing")


def test_a_comparison_examines_with_the_split_test_of_a_hub_data_set(hub, tmp_path):
    """From a file, since evaluate.py reads nothing from the hub."""
    rows = {"train": {"question": "a"}, "test": {"question": "b", "image": "1.png", "category": "sum"}}
    files = {f"{split}.jsonl": json.dumps({"answer": "5", **row}).encode() for split, row in rows.items()}
    hub.add("someone/exam", {**files, "1.png": encoded(1)})
    tested = held_out.read_tested("someone/exam", None)
    args = held_out.Namespace(test="someone/exam", output=tmp_path)
    file = held_out.write_split(tested, {}, args, tested)["test"]
    assert Path(file) == tmp_path / "test.parquet"
    (sample,) = load_messages(file, split="test", default_split="test")[0]
    assert sample["messages"][0]["content"][-1]["text"] == "b" and pixels(sample) == pictures(1)
    assert held_out.read_categories(file, "test", None) == ["sum"]


def test_the_pictures_of_a_hub_data_set_may_be_here(hub):
    rows = [{"messages": turns(), "images": ["1.png"]}]
    hub.add("someone/chains", {"train.jsonl": json.dumps(rows[0]).encode(), "other.png": encoded(0)})
    (sample,) = load_messages("someone/chains", images="images")[0]
    assert pixels(sample) == pictures(1)
    assert hub.fetched("someone/chains") == ["train.jsonl"]
