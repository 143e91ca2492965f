"""What recipes/compare.py examines with has no image in common with what is trained on."""

import base64
import dataclasses
import io
import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import compare
import datasets
import numpy as np
import pytest
import yaml
from keep_sets import make, save_folder
from parts.frontier import Measured
from parts.held_out import check_images, groups_of, hold_out, in_common, marks_of, pictured, write_split
from parts.loading import load_messages
from PIL import Image


def picture(number):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(content, format="PNG")
    return content.getvalue()


def save(folder, samples, name="data.jsonl"):
    """samples: the numbers of the images of each."""
    for number in {number for images in samples for number in images}:
        (folder / f"{number}.png").write_bytes(picture(number))
        (folder / f"copy_of_{number}.png").write_bytes(picture(number))
    file = folder / name
    with open(file, "w") as lines:
        for i, images in enumerate(samples):
            told = {"question": f"{i}?", "answer": "5", "images": [f"{'copy_of_' * (i % 2)}{n}.png" for n in images]}
            lines.write(json.dumps(told) + "\n")
    return file


def asked(output, **more):
    return Namespace(**{"output": output, "test": None, "held_out": 40, "search": 0} | more)


def images(file):
    dataset = datasets.Dataset.from_parquet(file).cast_column("images", [datasets.Image(decode=False)])
    return [image["bytes"] for row in dataset["images"] for image in row]


@pytest.mark.parametrize("search", [0, 3])
def test_questions_about_one_image_are_held_out_together(search, tmp_path):
    """Also where copies of it lie elsewhere."""
    dataset, _ = load_messages(save(tmp_path, [[i // 4] for i in range(200)]))
    args = asked(tmp_path, search=search)
    files = write_split(dataset, hold_out(groups_of(marks_of(dataset)), args), args)
    sizes = {name: len(images(file)) for name, file in files.items() if file}
    assert sizes == {"test": 40, "train": 160} | ({"validation": 40, "fitting": 120} if search else {})
    assert not {*images(files["test"])} & {*images(files["train"])}
    if search:
        assert not {*images(files["validation"])} & {*images(files["fitting"])}
        assert {*images(files["validation"])} | {*images(files["fitting"])} == {*images(files["train"])}


def test_what_has_an_image_in_common_through_others_belongs_together():
    marks = [{"a"}, {"b"}, set(), {"c"}, {"a", "b"}, set(), {"b", "d"}]
    assert groups_of(marks) == [[0, 1, 4, 6], [2], [3], [5]]
    assert in_common([{"a", "b"}, set()], marks) == 4


def test_an_image_of_half_the_data_is_trained_on_if_there_are_others(tmp_path):
    """And the last group may have more samples than are missing."""
    dataset, _ = load_messages(save(tmp_path, [[0] for _ in range(20)] + [[1 + i // 3] for i in range(21)]))
    groups, args = groups_of(marks_of(dataset)), asked(tmp_path, held_out=4)
    files = write_split(dataset, hold_out(groups, args), args)
    assert len(images(files["test"])) == 6 and picture(0) not in images(files["test"])
    with pytest.raises(
        ValueError,
        match="21 of the 41 samples of the data would be held out, where samples with an image in common, or the "
        "same question without one, stay together, up to 20 of them: "
        "hold out fewer with --held-out, or name other samples with --test",
    ):
        hold_out(groups, asked(tmp_path, held_out=19))


def test_samples_to_test_with_whose_images_are_trained_on_are_counted(tmp_path, monkeypatch, capsys):
    trained, tested = save(tmp_path, [[1], [2], [2], []]), save(tmp_path, [[2], [1], [3], [], [5, 1]], "test.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": "b", "data": str(trained), "method": "sft", "use_cpu": True}))

    def launch(*command):
        raise compare.Failed("stopped")

    monkeypatch.setattr(compare, "launch", launch)
    said = f"note: 4 of the 5 samples of {tested} have an image that is trained on"  # and one the question 3?
    for test, told in ((tested, [said]), (None, [])):
        more = ["--test", str(test)] if test else ["--held-out", "1"]
        with pytest.raises(SystemExit, match="stopped"):
            compare.main([str(recipe), "-o", str(tmp_path / f"out{bool(test)}"), *more, "--ways", "base"])
        notes = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
        assert [line.partition(",")[0] for line in notes] == told


def in_splits(folder):
    """A folder with a split to train on beside the one to test on."""
    for split, numbers in (("train", range(9)), ("test", [9])):
        rows = [{"question": "a", "answer": "5", "image": {"bytes": picture(n), "path": None}} for n in numbers]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def one(**row):
    """A file of one sample, beside its picture."""

    def make(folder):
        (folder / "9.png").write_bytes(picture(9))
        (folder / "own.jsonl").write_text(json.dumps({"answer": "5", **row}))
        return folder / "own.jsonl"

    return make


ASKED = [{"role": "user", "content": [{"type": "image", "path": "9.png"}, {"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    "test",
    [
        in_splits,
        one(question="a", image="9.png"),
        one(question="a", image="set/9.png"),
        one(question="a", file_name="9.png"),
        one(question="a", image=base64.b64encode(picture(9)).decode()),
        one(prompt=ASKED, completion="5"),
    ],
    ids=["splits", "path", "name of the set", "file_name", "base64", "prompt"],
)
def test_exams_and_the_keep_set_to_measure_with_have_the_same_images(test, tmp_path, monkeypatch):
    """However the samples of --test are laid out, and whatever else is in their folder."""
    (tmp_path / "set").mkdir()
    trained, tested, taken = save(tmp_path, [[1], [2]]), test(tmp_path / "set"), {}
    monkeypatch.setattr(compare, "read_recipe", lambda file: {"base": "b", "data": str(trained)})

    def launch(*command):
        command = [*map(str, command)]
        flag = "--images" if "make" in command else "--data"
        taken[flag] = command[command.index(flag) + 1]
        if flag == "--data":
            raise compare.Failed("stopped")

    monkeypatch.setattr(compare, "launch", launch)
    with pytest.raises(SystemExit, match="stopped"):
        compare.main(["r.yaml", "-o", str(tmp_path / "out"), "--test", str(tested), "--ways", "base"])
    assert taken["--images"] == taken["--data"] and images(taken["--data"]) == [picture(9)]


def test_a_search_is_judged_by_images_that_nothing_is_kept_on(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    data = save(tmp_path, [[n] for n in range(40)])
    recipe.write_text(yaml.safe_dump({"base": "b", "data": str(data), "method": "sft", "use_cpu": True}))
    launched = []

    def launch(*command):
        launched.append([*map(str, command)])
        if len(launched) == 3:
            raise compare.Failed("stopped")

    monkeypatch.setattr(compare, "launch", launch)
    with pytest.raises(SystemExit, match="stopped"):
        more = ["--held-out", "4", "--search", "2", "--ways", "base", "sft-keep"]
        compare.main([str(recipe), "-o", str(tmp_path / "out"), *more])
    made = {Path(command[command.index("-o") + 1]).name: command[command.index("--images") + 1] for command in launched}
    assert [*made] == ["keep_test.safetensors", "keep_validation.safetensors", "keep.safetensors"]
    kept, judged = (images(made[f"{name}.safetensors"]) for name in ("keep", "keep_validation"))
    assert len(judged) == 4 and not {*kept} & {*judged} and not {*kept} & {*images(made["keep_test.safetensors"])}


def test_images_that_are_measured_on_and_kept_on_are_told(tmp_path, capsys):
    folder = save_folder(tmp_path, "qwen2_5_vl")
    make(folder)
    measured = tmp_path / "keep.safetensors"
    other = shutil.copy(measured, tmp_path / "keep_validation.safetensors")  # of a search that was added later
    comparison = compare.Comparison(None, {}, {}, str(measured), {"test": measured, "validation": other}, None)
    assert comparison.note_kept()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    for file, note in zip((measured, other), said, strict=True):
        told = rf"note: (\d+) of the \1 images of {file}, by which the distance from the VLM is measured, are also in "
        assert re.match(told + str(measured), note)
    assert not dataclasses.replace(comparison, keep="someone/not-made.safetensors").note_kept()
    assert not capsys.readouterr().err


def test_each_exam_is_measured_on_its_own_images_or_else_on_the_recipes(tmp_path, monkeypatch):
    """As where training is about text, and --test has pictures."""
    trained, tested = save(tmp_path, [[]] * 8), save(tmp_path, [[1]], "test.jsonl")
    made = {}

    def launch(*command):
        _, *command = [*map(str, command)]
        if "make" not in command:
            raise compare.Failed("stopped")
        made[Path(command[command.index("-o") + 1]).stem] = command[command.index("--images") + 1]

    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr(compare, "read_recipe", lambda file: {"base": "b", "data": str(trained), "keep_images": "own"})
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="stopped"):
        more = ["--test", str(tested), "--held-out", "2", "--search", "2", "--ways", "base", "sft"]
        compare.main(["r.yaml", "-o", str(output), *more])
    assert made == {"keep_test": str(output / "test.parquet"), "keep_validation": "own"}


def test_what_there_are_no_images_for_is_told_first(tmp_path, capsys):
    """A held-out part may happen to have none."""
    dataset, _ = load_messages(save(tmp_path, [[1], [2], [], [3]]))
    capsys.readouterr()
    shown = pictured(dataset, {"train": [0, 1, 3], "fitting": [0, 1], "validation": [3], "test": [2]}, None)
    assert shown == {"train": True, "fitting": True, "validation": True, "test": False}
    assert pictured(dataset, {"train": [2], "test": []}, dataset) == {"train": False, "test": True}
    check_images(shown, "pictures", "k", 0.1)
    blind = {"train": True, "test": False}
    for parts in (shown, blind):
        with pytest.raises(ValueError, match=r"--budget is of the distance .*: name some in the recipe's keep_images"):
            check_images(parts, None, "k", 0.1)
    with pytest.raises(ValueError, match="there is no keep set k, and the samples to train on have no images to make"):
        check_images({"train": True, "fitting": False, "validation": True, "test": True}, None, "k", None)
    assert not capsys.readouterr().err
    for parts in (shown, blind):
        check_images(parts, None, "k", None)
        assert "is not measured: no sample of test has an image; to measure it, name" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_they_are_told_as_soon_as_the_keep_set_is_there(there, tmp_path, monkeypatch):
    """Before anything is measured, or once the first run that keeps has made it."""
    data, keep, done = save(tmp_path, [[n] for n in range(8)]), tmp_path / "keep.safetensors", []
    if there:
        keep.touch()

    def measure(comparison, way):
        keep.touch()
        done.append(way.name)
        return Measured(*np.zeros((3, 2)))

    monkeypatch.setattr(compare, "read_recipe", lambda file: {"base": "b", "data": str(data), "keep": str(keep)})
    monkeypatch.setattr(compare.Comparison, "measure", measure)
    monkeypatch.setattr(compare, "note_of_kept", lambda keep, measured: done.append("noted"))
    for name in ("launch", "draw"):
        monkeypatch.setattr(compare, name, lambda *given: None)
    compare.main(["r.yaml", "-o", str(tmp_path / "out"), "--held-out", "2", "--ways", "base", "sft-keep"])
    assert done == (["noted", "base", "sft-keep"] if there else ["base", "sft-keep", "noted"])
