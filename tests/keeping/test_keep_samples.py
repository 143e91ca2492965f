"""The hard form: a keep set as training samples, by the command and among a recipe's data."""

import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
from command import run
from keep_sets import ENDS, make
from parts.loading import load_messages
from parts.replay import with_replay
from PIL import Image
from transformers import AutoProcessor

from drift_peft.keeping import keep_summary, training_samples, write_samples
from drift_peft.keeping.file import upright


@pytest.fixture(scope="module")
def keep_set(folder):
    return make(folder, "short.safetensors", max_new_tokens=3)


def whole(keep_set):
    """Which answers ended by themselves, and say something."""
    return [i for i, s in enumerate(keep_set) if (len(s.tokens) < 3 or int(s.tokens[-1]) in ENDS) and s.answer.strip()]


def test_a_sample_says_all_tokens_of_the_answer(keep_set, folder):
    """Special ones among them, as those that mark a place; but not the one that ends it."""
    words = AutoProcessor.from_pretrained(folder / "base").tokenizer
    kept, _ = training_samples(keep_set)
    answers = {(keep_set[i].question, tuple(keep_set[i].tokens.tolist())) for i in whole(keep_set)}
    said = set()
    for _, (question, answer) in kept:
        tokens = words(answer["content"], add_special_tokens=False)["input_ids"]
        said.add((question["content"].removeprefix("<image>"), tuple(tokens)))
    special = {*words.all_special_ids}
    assert any(special & {*tokens} for _, tokens in said)
    for question, tokens in answers:
        assert (question, tokens[:-1] if tokens[-1] in special & {*ENDS} else tokens) in said


def test_the_command_writes_what_the_recipes_read(keep_set, capsys, tmp_path):
    where = tmp_path / "samples"
    status, out, _ = run(capsys, "keep", "samples", keep_set.path, "-o", where, "--json")
    result, kept = json.loads(out), whole(keep_set)
    assert status == 0 and 0 < len(kept) < 20
    assert result["written"] == len(kept) == 20 - sum(result["left_out"].values())
    longest = [sample for sample in keep_set if len(sample.tokens) == 3]
    cut = sum(int(sample.tokens[-1]) not in ENDS for sample in longest)
    assert result["left_out"]["cut at max_new_tokens=3"] == cut and 0 < cut < len(longest)
    assert keep_summary(keep_set)["total"]["cut"] == cut
    dataset, dropped = load_messages(where / "samples.jsonl")
    assert not dropped and len(dataset) == len(kept)
    for i, row in zip(kept, dataset, strict=True):
        question, answer = row["messages"]
        assert [part["type"] for part in question["content"]] == ["image", "text"]
        assert question["content"][1]["text"] == keep_set[i].question
        assert (answer["role"], answer["content"][0]["text"]) == ("assistant", keep_set[i].answer)
        assert row["images"][0].tobytes() == keep_set[i].image.tobytes()
    status, out, _ = run(capsys, "keep", "samples", keep_set.path, "-o", tmp_path / "other.jsonl")
    assert status == 0 and "left out: cut at max_new_tokens=3" in " ".join(out.split())
    assert load_messages(tmp_path / "other.jsonl")[0]["messages"] == dataset["messages"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "other_images", "samples"]


def test_lines_are_as_other_trainers_take_them(keep_set, tmp_path):
    """LLaMA-Factory and ms-swift: texts with <image>, and paths that start from the file's folder."""
    write_samples(keep_set, tmp_path / "keep.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "keep.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert question["content"].count("<image>") == len(row["images"]) == 1 and "<image>" not in answer["content"]
        assert (tmp_path / row["images"][0]).is_file()
    files = [keep_set.image_file(keep_set.image_of(i)) for i in whole(keep_set)]
    assert [(tmp_path / row["images"][0]).read_bytes() for row in rows] == files  # as they are
    assert len([*(tmp_path / "keep_images").iterdir()]) == len({*files})  # each once


def test_outputs_that_are_there_are_left(keep_set, capsys, tmp_path):
    (tmp_path / "file").touch()
    for name, told in (
        ("file", "file is no folder, and no file that ends in .jsonl: name either"),
        ("k.json", "k.json is no folder, and no file"),
        ("gone/keep.jsonl", "there is no folder"),
        ("gone/keep", "there is no folder"),
    ):
        status, _, err = run(capsys, "keep", "samples", keep_set.path, "-o", tmp_path / name)
        assert status == 1 and told in err and err.count("\n") == 1, name
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    write_samples(keep_set, tmp_path / "keep.jsonl")
    (tmp_path / "keep_images" / "000099.png").touch()
    with pytest.raises(FileExistsError, match=r"keep_images exists: name another one, or pass overwrite=True"):
        write_samples(keep_set, tmp_path / "keep.jsonl")
    (tmp_path / "keep_images").rename(tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"keep\.jsonl exists"):
        write_samples(keep_set, tmp_path / "keep.jsonl")
    (tmp_path / "mine").rename(tmp_path / "keep_images")
    before = (tmp_path / "keep.jsonl").read_bytes()
    status, _, err = run(capsys, "keep", "samples", keep_set.path, "-o", tmp_path / "keep.jsonl", "--overwrite")
    assert status == 1 and err.count("\n") == 1
    assert f"keep_images holds 000099.png, which {tmp_path}/keep.jsonl does not name" in err  # it is somebody's own
    assert (tmp_path / "keep_images" / "000099.png").exists() and (tmp_path / "keep.jsonl").read_bytes() == before
    (tmp_path / "keep_images" / "000099.png").unlink()
    (tmp_path / "keep_images" / ".DS_Store").touch()  # of a file manager
    status, *_ = run(capsys, "keep", "samples", keep_set.path, "-o", tmp_path / "keep.jsonl", "--overwrite")
    assert status == 0 and (tmp_path / "keep.jsonl").read_bytes() == before
    (tmp_path / "keep_images").rename(tmp_path / "elsewhere")
    (tmp_path / "keep_images").symlink_to(tmp_path / "elsewhere")
    write_samples(keep_set, tmp_path / "keep.jsonl", overwrite=True)
    assert not (tmp_path / "keep_images").is_symlink() and (tmp_path / "keep.jsonl").read_bytes() == before
    assert [*(tmp_path / "elsewhere").iterdir()]  # what the link led to is left


class Edited:
    """A keep set with other answers, questions or limits."""

    def __init__(self, keep_set, longest=99, **changes):
        self.whole, self.changes, self.source = keep_set, changes, "edited"
        self.metadata = {"generation": {"max_new_tokens": longest}}
        self.image_of = keep_set.image_of

    def was_cut(self, sample):
        return len(sample.tokens) == self.metadata["generation"]["max_new_tokens"]

    def unpictured(self):
        for i, sample in enumerate(self.whole.unpictured()):
            vars(sample).update(self.changes if i % 2 else {})
            yield sample


def test_answers_that_teach_something_else_are_left_out(keep_set):
    empty = sum(not s.answer.strip() for s in keep_set)
    kept, left_out = training_samples(Edited(keep_set))
    assert len(kept) == 20 - empty and left_out == Counter({"without words": empty} if empty else {})
    for changes, reason in (
        ({"answer": " \n"}, "without words"),
        ({"answer": "an <image>"}, "with <image> in their words"),
        ({"question": "is <image> a tag?", "answer": "yes"}, "with <image> in their words"),
    ):
        kept, left_out = training_samples(Edited(keep_set, **changes))
        assert len(kept) + sum(left_out.values()) == 20 and left_out[reason] >= 10, changes


def test_a_set_of_cut_answers_says_so(folder):
    cut = Edited(make(folder, "cut.safetensors", max_new_tokens=1, samples=4), longest=1)
    with pytest.raises(ValueError, match=r"edited can be trained on, 4 are cut at max_new_tokens=1: make a set with"):
        training_samples(cut)


def test_a_picture_that_trainers_may_read_in_another_way_is_written_as_it_was_shown(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert("RGB")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    turned = make(folder, "turned.safetensors", images=[tmp_path / "turned.jpg"], samples=12)
    write_samples(turned, tmp_path / "keep.jsonl")
    (written,) = (tmp_path / "keep_images").iterdir()
    with Image.open(written) as found, Image.open(io.BytesIO(turned.image_file(0))) as as_it_was:
        assert found.size == (16, 24) and not found.getexif()
        assert found.tobytes() == upright(as_it_was).tobytes()
    Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)).save(tmp_path / "deep.png")
    deep = make(folder, "deep.safetensors", images=[tmp_path / "deep.png"], samples=12)
    write_samples(deep, tmp_path / "deep")
    (written,) = (tmp_path / "deep" / "samples_images").iterdir()
    with Image.open(written) as found:
        assert found.mode == "RGB" and found.tobytes() == deep[0].image.tobytes()


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_share_of_the_training_samples(keep_set, folder, tmp_path, share):
    write_samples(keep_set, tmp_path / "own")
    data = load_messages(tmp_path / "own" / "samples.jsonl")[0].select(range(4))
    processor, count = AutoProcessor.from_pretrained(folder / "base"), len(whole(keep_set))
    mixed, told = with_replay(data, keep_set, share, processor, 1000, seed=1)
    added = mixed.select(range(4, len(mixed)))
    assert mixed.select(range(4)).to_dict() == data.to_dict() and mixed.features == data.features
    assert len(added) / len(mixed) == share == pytest.approx({1: 0.2, 36: 0.9}[len(added)])
    assert told["samples"] == len(added) and told["answers"] == count
    asked = Counter((row["messages"][0]["content"][1]["text"], row["images"][0].tobytes()) for row in added)
    assert max(asked.values()) - (min(asked.values()) if len(asked) == count else 0) <= 1  # in turns
    again, _ = with_replay(data, keep_set, share, processor, 1000, seed=1)
    other, _ = with_replay(data, keep_set, share, processor, 1000, seed=2)
    assert again["messages"] == mixed["messages"] and (share < 0.5 or other["messages"] != mixed["messages"])


def test_answers_come_in_the_mode_of_the_data(keep_set, folder, tmp_path):
    """Of a base whose processor takes one channel."""
    write_samples(keep_set, tmp_path / "own")
    gray = datasets.List(datasets.Image(mode="L"))
    data = load_messages(tmp_path / "own" / "samples.jsonl")[0].cast_column("images", gray)
    processor = AutoProcessor.from_pretrained(folder / "base")
    processor.image_processor.image_mean = processor.image_processor.image_std = [0.5]
    processor.image_processor.do_convert_rgb = False
    mixed, told = with_replay(data, keep_set, 0.5, processor, 1000, seed=1)
    assert len(mixed) == 2 * len(data) and not any("refused" in reason for reason in told["left_out"])
    assert {image.mode for row in mixed for image in row["images"]} == {"L"}


def test_where_all_answers_are_too_long_that_is_told(keep_set, folder, tmp_path):
    write_samples(keep_set, tmp_path / "own")
    data = load_messages(tmp_path / "own" / "samples.jsonl")[0]
    processor = AutoProcessor.from_pretrained(folder / "base")
    left_out = 20 - len(whole(keep_set))
    with pytest.raises(ValueError, match=rf"^no sample of {keep_set.source} is left: {left_out} cut at .*; \d+ longer"):
        with_replay(data, keep_set, 0.5, processor, 3, seed=1)
