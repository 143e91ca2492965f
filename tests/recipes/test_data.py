"""recipes/data.py: every common layout becomes what TRL takes; whatever cannot be used is dropped and counted."""

import base64
import io
import json
import os
from collections import Counter
from pathlib import Path

import data
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hub import Hub
from huggingface_hub import HfFileSystem
from parts import sources
from parts.layouts import BadSample
from parts.lengths import count_tokens, within_length
from parts.loading import FEATURES, load_messages
from PIL import Image
from tiny_vlm import CHAT, PROCESSORS, tokenizer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

RECIPES = Path(__file__).parents[2] / "recipes"

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
TWO = [{"role": "user", "content": [text("is"), IMAGE, text("or"), IMAGE, text("larger?")]}, ONE[1]]
PNG = f"data:image/png;base64,{base64.b64encode(encoded(1)).decode()}"
LAYOUTS = {  # name -> row, messages, numbers of its pictures
    "published set": ({"messages": turns(), "images": ["images/1.png"]}, ONE, [1]),
    "its paths": ({"messages": turns(), "images": ["../set/images/1.png"]}, ONE, [1]),
    "llava": ({"image": "images/1.png", "conversations": turns(names=("from", "value"), roles=("human", "gpt"))},
              ONE, [1]),
    "two pictures": ({"messages": turns("is <image> or <image> larger?"), "images": ["images/2.png", "images/0.png"]},
                     TWO, [2, 0]),
    "no placeholder": ({"messages": turns("how many?"), "images": ["images/1.png"]}, ONE, [1]),
    "openai": ({"messages": turns([{"type": "image_url", "image_url": {"url": PNG}}, text("how many?")], [BOXED])},
               ONE, [1]),
    "openai, of mixed types": ({"messages": turns([{"type": "image_url", "image_url": "images/1.png"}, "how many?"])},
                               ONE, [1]),
    "parts, images beside": ({"messages": turns([{"type": "image"}, {"type": "text", "text": "how many?"}], [BOXED]),
                              "images": ["images/1.png"]}, ONE, [1]),
    "parts, images in them": ({"messages": turns([{"type": "image", "path": "images/1.png"}, text("how many?")],
                                                 [BOXED])}, ONE, [1]),
    "system beside": ({"system": "Think.", "messages": turns(), "image": "images/1.png"},
                      [{"role": "system", "content": [text("Think.")]}, *ONE], [1]),
    "question and answer": ({"problem": "<image>how many?", "answer": ANSWER, "image": "images/1.png"}, ONE, [1]),
    "turns as JSON": ({"messages": json.dumps(turns()), "images": ["images/1.png"]}, ONE, [1]),
    "no picture": ({"question": "how many?", "response": ANSWER},
                   [{"role": "user", "content": [text("how many?")]}, ONE[1]], []),
    "four turns": ({"conversations": turns() + turns("sure?"), "images": ["images/1.png"]},
                   [*ONE, {"role": "user", "content": [text("sure?")]}, ONE[1]], [1]),
}  # fmt: skip


@pytest.mark.parametrize("file", ["a.jsonl", "a.json"])
def test_every_layout_becomes_trls_even_mixed_in_one_file(file):
    samples, dropped = load(save([row for row, _, _ in LAYOUTS.values()], file), boxed=True)
    assert not dropped and len(samples) == len(LAYOUTS)
    for sample, (_, messages, numbers) in zip(samples, LAYOUTS.values(), strict=True):
        assert sample["messages"] == messages
        assert pixels(sample) == pictures(*numbers)
    assert {"messages (role, content)", "conversations (from, value)", "problem, answer"} <= dropped.layouts


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name != "openai, of mixed types"]
)  # arrow has no such columns
def test_every_layout_in_a_parquet_file(layout):
    row, messages, numbers = LAYOUTS[layout]
    dataset, dropped = load_messages(save([row, row], "a.parquet"), boxed=True)
    assert not dropped and len(dropped.layouts) == 1
    assert [sample["messages"] for sample in dataset] == [messages] * 2
    assert pixels(dataset[1]) == pictures(*numbers)


def test_pictures_in_a_parquet_file_may_be_bytes_or_what_datasets_stores():
    rows = [{"problem": "how many?", "answer": "5", "image": encoded(i)} for i in range(2)]
    samples, _ = load(save(rows, "a.parquet"))
    assert [pixels(sample) for sample in samples] == [pictures(0), pictures(1)]
    features = datasets.Features({"messages": datasets.Value("string"), "images": [datasets.Image()]})
    rows = {"messages": [json.dumps(turns())], "images": [[picture(2)]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet("b.parquet")
    assert pixels(load("b.parquet")[0][0]) == pictures(2)


def test_answers_stay_as_they_are_written():
    answers = ["1.50", "007", "null", "true", "1e5", "½ – “quoted”", "<think>\n a\n</think>\n\n5"]
    rows = [
        {"messages": turns([text("how many?")], answer)} for answer in answers
    ]  # of mixed types, as OpenAI's often are
    for file in ("a.jsonl", "a.json"):
        samples, _ = load(save(rows, file))
        assert [sample["messages"][1]["content"][0]["text"] for sample in samples] == answers


BAD = {  # name -> row, reason, sentence after "sample 2 of a.jsonl "
    "no picture": ({"messages": turns(), "images": ["images/9.png"]}, "image missing",
                   "names the image images/9.png, which is not there: paths start from ."),
    "no path": ({"messages": turns(), "images": [None]}, "image missing", "has an image that is None: a path, or "),
    "on the web": ({"messages": turns(), "images": ["https://x.org/a.png"]}, "image missing",
                   "names the web address https://x.org/a.png: download it, and name the file"),
    "of no name": ({"messages": turns(), "images": [""]}, "image missing", "names the image , which is not there"),
    "a folder": ({"messages": turns(), "images": ["."]}, "image missing", "names the image ., which is not there"),
    "a chain of addresses": ({"messages": turns(), "images": ["/x::http://127.0.0.1:9/a"]}, "image missing",
                             "names the image /x::http://127.0.0.1:9/a, which is not there"),
    "half a sign": ({"messages": turns(), "images": ["\ud800.png"]}, "image missing",
                    "names the image \\ud800.png, which is not there"),
    "elsewhere": ({"messages": turns(), "images": ["../elsewhere.png"]}, "image outside its folder",
                  "names the image ../elsewhere.png, which is outside of .: name its folder with --images"),
    "elsewhere, in full": ({"messages": turns(), "images": [{"path": str(RECIPES / "data.py")}]},
                           "image outside its folder", f"names the image {RECIPES / 'data.py'}, which is outside of "),
    "half a sign in a text": ({"messages": turns(answer="5 \ud83d")}, "broken text", "has half a sign in its text, a "),
    "a list of roles": ({"messages": turns(roles=(["user"], "assistant"))}, "unknown layout",
                        "has a turn whose role is ['user']: one of user, "),
    "nested": ("[" * 100_000, "broken JSON", "is no valid JSON: maximum recursion depth exceeded"),
    "truncated": ({"messages": turns(), "images": ["cut.jpg"]}, "image broken", "has a broken image cut.jpg: "),
    "damaged": ({"messages": turns(), "images": ["damaged.png"]}, "image broken", "has a broken image damaged.png: "),
    "no image": ({"messages": turns(), "images": ["a.jsonl"]}, "image broken",
                 "has a broken image a.jsonl: cannot identify image file"),
    "not base64": ({"messages": turns(), "images": ["data:image/png;base64,?"]}, "image broken",
                   "has a broken image in a data: address: "),
    "one placeholder": ({"messages": turns(), "images": ["images/0.png", "images/1.png"]}, "placeholders != images",
                        "has 1 placeholder for 2 images: give each image its <image>"),
    "two placeholders": ({"messages": turns("<image><image> a"), "images": ["images/0.png"]}, "placeholders != images",
                         "has 2 placeholders for 1 image: give each image its <image>"),
    "no images": ({"messages": turns()}, "placeholders != images", "has 1 placeholder for 0 images"),
    "answered with one": ({"messages": turns("a", "<image>"), "images": ["images/0.png"]}, "placeholders != images",
                          "has an image in a turn of the assistant: take <image> out"),
    "no answer": ({"messages": turns("a", " \n")}, "empty answer", "has a turn of the assistant that says nothing"),
    "no question": ({"messages": turns("", "a")}, "empty question", "has a turn of the user that says nothing"),
    "half a dialogue": ({"messages": turns()[:1], "image": "images/0.png"}, "roles out of order",
                        "has the turns user: user and assistant by turns, the assistant last"),
    "twice": ({"messages": turns() + turns()[1:], "image": "images/0.png"}, "roles out of order",
              "has the turns user, assistant, assistant: user and assistant by turns"),
    "nobody": ({"messages": [], "conversations": []}, "unknown layout", "has messages, conversations: name its turns"),
    "a tool": ({"messages": turns(roles=("user", "tool"))}, "unknown layout", "has a turn whose role is 'tool': one "),
    "a video": ({"messages": turns([{"type": "video"}])}, "unknown layout", "has a part of type 'video': text, "),
    "a number": ({"messages": turns(5)}, "unknown layout", "has a turn that says '5': a text or a list of parts"),
    "other keys": ({"prompt": "a", "label": 1}, "unknown layout",
                   "has prompt, label: name its turns messages or conversations, or its question and answer so"),
    "no turns": ({"messages": "how many?"}, "unknown layout", "has messages that are no list of turns: "),
    "no object": (["a"], "unknown layout", "is no sample but \"['a']\": each has to be a JSON object"),
    "torn": ("{torn", "broken JSON", "is no valid JSON: "),
}  # fmt: skip


@pytest.fixture
def bad_file(folder):
    """Every sort of bad sample, with a good one before and after each."""
    (folder / "cut.jpg").write_bytes(encoded(0, "JPEG")[:-20])
    (folder.parent / "elsewhere.png").write_bytes(encoded(0))
    whole = encoded(0)
    (folder / "damaged.png").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    good, lines = json.dumps({"messages": turns(), "images": ["images/0.png"]}), []
    for row, _, _ in BAD.values():
        lines += [good, row if isinstance(row, str) else json.dumps(row)]
    (folder / "a.jsonl").write_text("\n".join([*lines, good]))


def test_what_is_bad_is_dropped_with_its_reason_and_the_rest_is_kept(bad_file):
    samples, dropped = load("a.jsonl")
    assert len(samples) == len(BAD) + 1 and all(sample["messages"] == ONE for sample in samples)
    assert dropped == Counter(reason for _, reason, _ in BAD.values())
    for i, (name, (_, reason, expected)) in enumerate(BAD.items()):
        sentence = [*dropped.sentences][i]
        assert sentence.startswith(f"sample {2 * i + 2} of a.jsonl {expected}"), name
        assert dropped.sentences[sentence] == reason and "\n" not in sentence


@pytest.mark.parametrize("kind", BAD)
def test_or_the_first_that_is_bad_is_an_error(kind, bad_file, folder):
    line = (folder / "a.jsonl").read_text().splitlines()[2 * [*BAD].index(kind) + 1]
    (folder / "b.jsonl").write_text(line)
    with pytest.raises(BadSample) as error:
        load_messages("b.jsonl", on_bad="fail")
    _, reason, expected = BAD[kind]
    assert error.value.reason == reason and str(error.value).startswith(f"sample 1 of b.jsonl {expected}")


def test_a_stream_fails_when_it_comes_to_a_bad_sample(bad_file):
    stream, _ = load_messages("a.jsonl", on_bad="fail", streaming=True)
    with pytest.raises(BadSample, match=r"^sample 2 of a\.jsonl "):
        list(stream)


def test_an_answer_without_a_box_is_dropped_where_boxes_are_wanted():
    answers = [ANSWER, "5", r"\boxed{}", r"\boxed{5", r"\boxed{4} \boxed{\frac{1}{2}}"]
    save([{"question": "a", "answer": answer} for answer in answers], "a.jsonl")
    assert len(load("a.jsonl")[0]) == 5
    samples, dropped = load("a.jsonl", boxed=True)
    assert len(samples) == 2 and dropped == {"answer without a box": 3}
    assert dropped.first() == {"answer without a box": r"sample 2 of a.jsonl has no \boxed{…} in its answer"}


def test_a_picture_that_was_put_right_is_seen(folder):
    save([{"messages": turns(), "images": [f"images/{i}.png"]} for i in (9, 0)], "a.jsonl")
    assert load_messages("a.jsonl")[1] == {"image missing": 1}
    (folder / "images" / "9.png").write_bytes(encoded(2))
    dataset, dropped = load_messages("a.jsonl")
    assert not dropped and [pixels(sample) for sample in dataset] == [pictures(2), pictures(0)]


def test_many_samples_keep_their_numbers_and_empty_lines_are_none(folder):
    rows = [json.dumps({"question": f"{i}", "answer": "a" if i % 40 else ""}) for i in range(1, 101)]
    (folder / "a.jsonl").write_text("\n\n".join(rows))  # sample i in line 2 i - 1
    samples, dropped = load("a.jsonl")
    assert [sample["messages"][0]["content"][0]["text"] for sample in samples] == [
        str(i) for i in range(1, 101) if i % 40
    ]
    assert dropped == {"empty answer": 2}
    assert list(dropped.sentences) == [
        f"sample {n} of a.jsonl has a turn of the assistant that says nothing" for n in (79, 159)
    ]


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
    assert dropped.report()["changed"] == ({counted: 1} if counted else {})


def test_palettes_with_a_transparent_colour_and_images_of_several_frames():
    palette = Image.fromarray((BYTES > 127).astype(np.uint8) * 255).convert("P")
    palette.save("a.gif", transparency=palette.getpixel((0, 0)))
    frames = [picture(0), picture(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save("b.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("F", (4, 4), float("nan")).save("c.tiff")
    save([{"messages": turns(), "images": [name]} for name in ("a.gif", "b.webp", "c.tiff")], "a.jsonl")
    dataset, dropped = load_messages("a.jsonl")
    assert dropped.report()["changed"] == {"transparent: on white": 1, "several frames: the first": 1}
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
    [("missing.jsonl", None, "missing.jsonl is no file to be read: take one of .json, "),
     ("a.csv", b"a,b", "a.csv is no file to be read: take one of .json"),
     ("a.jsonl", b"", "a.jsonl cannot be read: "),
     ("a.jsonl", b"\xff\xfe{}", "a.jsonl cannot be read: 'utf-8' codec can't decode byte 0xff"),
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


def processor(family="llava_next"):
    make, image = PROCESSORS[family]
    return make(tokenizer(), chat_template=CHAT.replace("IMAGE", image))


SUMS = [("<image>how many ?", "2 + 3 = 5"), ("how many <image> ?", "5"), ("<image> <image>how many ?", "1 + 1 + 1 = 3")]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "idefics2"])
@pytest.mark.parametrize("streaming", [False, True])
def test_trls_collator_takes_the_result(family, streaming):
    rows = [
        {"messages": turns(question, answer), "images": [f"images/{i}.png" for i in range(question.count("<image>"))]}
        for question, answer in SUMS
    ]
    dataset, _ = load_messages(save(rows, "a.jsonl"), streaming=streaming)
    processing = processor(family)
    collator = DataCollatorForVisionLanguageModeling(processing)
    samples = [*dataset]
    for sample, (question, answer) in zip(samples, SUMS, strict=True):
        batch = collator([sample])
        assert (batch["input_ids"] == batch["labels"]).all()
        said = processing.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        asked = " ".join(question.replace("<image>", " ").split())
        assert " ".join(said.split()) == f"user: {asked} assistant: {answer}"
        assert count_tokens(sample["messages"], sample["images"], processing) == batch["input_ids"].shape[1]
        assert (batch["input_ids"] == processing.tokenizer.convert_tokens_to_ids("<image>")).any()
    assert collator(samples)["pixel_values"].isfinite().all()


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_too_long_is_dropped_whole(streaming):
    rows = [{"messages": turns("how many ?" + " 1" * i), "images": ["images/0.png"]} for i in (0, 30, 3, 40)]
    dataset, _ = load_messages(save(rows, "a.jsonl"), streaming=streaming)
    processing = processor()
    lengths = [count_tokens(sample["messages"], sample["images"], processing) for sample in dataset]
    images = processing.tokenizer.convert_tokens_to_ids("<image>")
    limit, dropped = lengths[2], Counter(empty=1)
    kept = within_length(dataset, processing, limit, dropped=dropped)
    for _ in range(2):  # a stream may be read again
        samples = [*kept]
    assert [sample["messages"][0]["content"][1]["text"] for sample in samples] == ["how many ?", "how many ? 1 1 1"]
    assert dropped == {"empty": 1, f"longer than {limit} tokens": 2}
    collator = DataCollatorForVisionLanguageModeling(processing)
    whole = (collator([next(iter(dataset))])["input_ids"] == images).sum()
    assert all((collator([sample])["input_ids"] == images).sum() == whole for sample in samples)
    with pytest.raises(BadSample) as error:
        [*within_length(dataset, processing, limit, on_long="fail", dropped=Counter())]
    assert str(error.value) == (
        f"sample 2 has {lengths[1]} tokens, its images' included, and {limit} are allowed: allow more, make the images "
        "smaller, or drop such samples"
    )


def test_what_the_processor_refuses_is_dropped_like_what_is_too_long():
    Image.new("RGB", (4000, 4)).save("images/wide.png")
    save([{"messages": turns(), "images": [f"images/{name}.png"]} for name in ("0", "wide")], "a.jsonl")
    dataset, dropped = load_messages("a.jsonl")
    refusing = processor("qwen2_5_vl")
    assert len(within_length(dataset, refusing, 100, dropped=dropped)) == 1
    assert dropped == {"refused by the processor": 1}
    for only in (dataset.select([1]), dataset):
        on_long = "drop" if len(only) == 1 else "fail"  # one that is left over is an error either way
        with pytest.raises(BadSample, match=r"^sample \d is refused by the processor: absolute aspect ratio"):
            within_length(only, refusing, 100, on_long=on_long, dropped=dropped)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [([{"question": "a", "answer": ""}] * 3,
      "no sample of a.json is left: 3 empty answer (sample 1 of a.json has a turn of the assistant that says nothing)"),
     ([], "no sample of a.json is left: it has none")],
)  # fmt: skip
def test_nothing_left_is_an_error(rows, sentence):
    with pytest.raises(BadSample) as error:
        load_messages(save(rows, "a.json"))
    assert str(error.value) == sentence


def run(*arguments, capsys):
    data.main([*map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_the_command_line_writes_a_file_that_stands_alone(streaming, folder, tmp_path, capsys):
    rows = [row for row, _, _ in LAYOUTS.values()] + [{"messages": turns("a", "")}]
    output = tmp_path / "out.parquet"
    printed = json.loads(run(save(rows, "a.jsonl"), "-o", output, "--json", *streaming, capsys=capsys))
    assert (printed["kept"], printed["dropped"]) == (len(LAYOUTS), {"empty answer": 1})
    assert printed["first"] == {
        "empty answer": f"sample {len(rows)} of a.jsonl has a turn of the assistant that says nothing"
    }
    before = [*load_messages("a.jsonl")[0]]
    for image in (folder / "images").iterdir():
        image.unlink()
    again, dropped = load(output)
    assert not dropped
    assert [sample["messages"] for sample in again] == [sample["messages"] for sample in before]
    assert [pixels(sample) for sample in again] == [pictures(*numbers) for _, _, numbers in LAYOUTS.values()]
    plain = datasets.load_dataset("parquet", data_files=str(output), split="train")  # as anyone would load it
    assert plain.features == FEATURES and plain[0]["images"][0].size == (11, 12)
    assert not [*tmp_path.glob("*.tmp")]


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    save([{"question": "a", "answer": answer} for answer in ("5", "", "")], "a.jsonl")
    out = run("a.jsonl", "-o", tmp_path / "out.parquet", capsys=capsys)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["kept", "1", "question, answer"] in rows
    assert ["empty answer", "2", "sample 2 of a.jsonl has a turn of the assistant that says nothing"] in rows


SILENT = "sample 1 of a.jsonl has a turn of the assistant that says nothing"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["-o", "out.txt"], "output out.txt is no parquet file: name one, such as out.parquet"),
     (["-o", "no/out.parquet"], "output no/out.parquet cannot be written: there is no folder no"),
     (["-o", "there.parquet"], "output there.parquet exists: name another file, or pass --overwrite"),
     (["-o", "out.parquet", "--on-bad", "fail"], SILENT),
     (["-o", "out.parquet", "--images", "no"], "images no is no folder"),
     (["-o", "out.parquet"], f"no sample of a.jsonl is left: 1 empty answer ({SILENT})"),
     (["-o", "out.parquet", "--streaming"], f"no sample of a.jsonl is left: 1 empty answer ({SILENT})")],
)  # fmt: skip
def test_errors_of_the_command_line_are_one_sentence_and_leave_nothing(arguments, sentence, folder, capsys):
    save([{"question": "a", "answer": ""}], "a.jsonl")
    (folder / "there.parquet").write_bytes(b"as it was")
    with pytest.raises(SystemExit) as stopped:
        data.main(["a.jsonl", *arguments])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"data.py: error: {sentence}"
    assert {file.name for file in folder.iterdir()} == {"images", "a.jsonl", "there.parquet"}
    assert (folder / "there.parquet").read_bytes() == b"as it was"


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


def test_the_pictures_of_a_hub_data_set_may_be_here(hub):
    rows = [{"messages": turns(), "images": ["1.png"]}]
    hub.add("someone/chains", {"train.jsonl": json.dumps(rows[0]).encode(), "other.png": encoded(0)})
    (sample,) = load_messages("someone/chains", images="images")[0]
    assert pixels(sample) == pictures(1)
    assert hub.fetched("someone/chains") == ["train.jsonl"]
