"""What a run says of the samples that it reads: what is dropped, why, what was done to them, and when it refuses."""

import json

import chain_files
import pytest
from chain_files import ANSWER, encoded, processor, save, turns
from parts import held_out
from parts import loose as loose_answers
from parts.arguments import RecipeParser, RunArguments
from parts.training_data import load_data
from PIL import Image

folder = chain_files.folder  # fixture


def row(image="images/0.png", **more):
    return {"messages": turns(**more), "images": [image]}


def told(capsys, **settings):
    _, data = load_data(RunArguments(base="b", data="a.jsonl", method="sft", **settings), processor())
    return capsys.readouterr().out.splitlines(), data


def test_each_reason_is_told_with_its_first_sample_and_what_was_done_to_images(capsys):
    Image.new("LA", (30, 30), (0, 9)).save("clear.png")
    rows = [row(), row("9.png"), row("clear.png"), row(answer=""), row("8.png")] + [
        row(f"images/{i}.png") for i in (1, 2)
    ]
    save(rows, "a.jsonl")
    lines, data = told(capsys)
    assert lines[0] == "4 samples; dropped: 3"
    first = (
        "sample 2 of a.jsonl names the image 9.png, which is not there: paths start from ., or from the folder that "
    )
    assert lines[1] == f"dropped, image missing: 2 (the first: {first}images names)"
    assert lines[2].startswith("dropped, empty answer: 1 (the first: sample 4 of a.jsonl has a turn")
    assert lines[3:] == ["kept, transparent: on white: 1 (the first: sample 3 of a.jsonl)"]
    assert data["noted"] == {"transparent: on white": 1}


def test_where_samples_are_too_long_it_is_told_how_long_they_are(capsys):
    save([row(answer=f"{ANSWER}{' 1' * i}") for i in range(20)], "a.jsonl")
    least = sorted(told(capsys)[1]["dropped"].lengths)[0]
    lines, data = told(capsys, max_tokens=least + 14)
    assert data["samples"] == 15 and lines[1].startswith(
        f"dropped, longer than {least + 14} tokens: 5 (the first: sample "
    )
    assert lines[2] == f"the longest sample has {least + 19} tokens, and 95 % have at most {least + 18}"


def test_a_run_on_what_is_left_of_mostly_bad_samples_is_refused(capsys):
    save([row(), row("9.png"), row("8.png")], "a.jsonl")
    with pytest.raises(ValueError) as error:
        told(capsys)
    assert str(error.value).startswith(
        "2 of the 3 samples of a.jsonl cannot be used: 2 image missing (sample 2 of a.jsonl "
    )
    assert str(error.value).endswith("or let recipes/data.py write what is left to a file, and train on that")
    save([row(), row("9.png")], "a.jsonl")
    assert told(capsys)[1]["samples"] == 1


def test_what_may_be_left_out_is_left_out_on_the_command_line_too(tmp_path):
    keys = ("prior", "expert", "reference", "images", "keep", "keep_images", "keep_questions", "merge_first")
    keys += ("run_name", "chat_template_path", "resume_from_checkpoint")
    (tmp_path / "r.yaml").write_text("base: b\ndata: d\nmethod: sft\nkeep: k.safetensors\nuse_cpu: true\n")
    flags = [part for i, key in enumerate(keys) for part in (f"--{key}", ("null", "none", "None")[i % 3])]
    more = ["--config", str(tmp_path / "r.yaml"), "--split", "none"]
    parsed = RecipeParser("a\n\nb").parse_args_and_config([*more, *flags])
    found = {**vars(parsed[0]), **vars(parsed[2])}
    assert {key: found[key] for key in keys} == dict.fromkeys(keys) and found["split"] == "none"


def test_a_comparison_tells_it_and_finds_the_images_of_its_test_in_the_recipes_folder(folder, tmp_path, capsys):
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    for i in range(3):
        (elsewhere / f"{i}.png").write_bytes(encoded(i))
    save([row("0.png"), row("9.png"), row("1.png")], "a.jsonl")
    save([{**row("2.png"), "category": "sum"}, row("0.png")], "test.jsonl")
    args = held_out.Namespace(test="test.jsonl", output=tmp_path, held_out=1, search=0)
    dataset, tested, _ = held_out.read_data(args, {"data": "a.jsonl", "images": str(elsewhere)})
    assert "dropped, image missing: 1 (the first: sample 2 of a.jsonl" in capsys.readouterr().err
    rows = held_out.hold_out(held_out.groups_of(held_out.marks_of(dataset)), args)
    files = held_out.write_split(dataset, rows, args, tested)
    assert files["test"] == str(tmp_path / "test.parquet")
    assert held_out.read_categories(files["test"], "test", None) == ["sum", "all"]
    again = held_out.read_tested(files["test"], None)
    assert held_out.marks_of(again) == held_out.marks_of(tested) and again["messages"][:] == tested["messages"][:]
    with pytest.raises(ValueError, match="or from the folder that images names"):
        held_out.read_tested("a.jsonl", None)


def test_a_split_of_a_file_is_refused_in_training_and_in_a_comparison(capsys):
    save([row()], "a.jsonl")
    sentence = (
        "^a.jsonl has no splits, so split test cannot be taken of it: leave split out, or name the file or folder"
    )
    with pytest.raises(ValueError, match=sentence):
        told(capsys, split="test")
    with pytest.raises(ValueError, match=sentence):
        held_out.read_data(held_out.Namespace(test=None), {"data": "a.jsonl", "split": "test"})
    assert told(capsys, split="train")[1]["samples"] == 1
    tested = held_out.Namespace(test="a.jsonl")
    assert len(held_out.read_data(tested, {"data": "a.jsonl", "split": "train"})[1]) == 1


def test_known_answers_of_a_test_are_taken_as_they_are_written(tmp_path):
    """As evaluate.py takes them, without the chain of thought beside one, which no exam looks at."""
    answers = ["<think>5", "<think>so it is 5</think>", "5<|im_end|>"]
    chained = {"question": "a", "answer": "5", "rationale": "2 + 3"}
    save([chained], "a.jsonl")
    save([*({"question": "q", "answer": answer} for answer in answers), chained], "test.jsonl")
    args = held_out.Namespace(test="test.jsonl", output=tmp_path, held_out=1, search=0)
    _, tested, _ = held_out.read_data(args, {"data": "a.jsonl"})
    assert [held_out.last_answer(each) for each in tested["messages"]] == [*answers, "5"]
    save([{"question": "q", "answer": answer} for answer in answers], "test.jsonl")
    digest = held_out.read_data(args, {"data": "a.jsonl"})[2]
    assert digest.startswith("e4cf4be1945b")  # of before all of them were examined in a file: comparisons go on
    of_categories = {digest}
    for names in (("sum",) * 3, ("sum", "sum", "product"), ("sum", "sum", None)):
        rows = zip(answers, names, strict=True)
        save([{"question": "q", "answer": answer, "category": name} for answer, name in rows], "test.jsonl")
        of_categories.add(held_out.read_data(args, {"data": "a.jsonl"})[2])
    assert len(of_categories) == 4


def test_a_question_without_images_is_not_examined_with_where_it_is_trained_on(tmp_path):
    samples = [{"question": f"{i}  +  1?", "answer": "5"} for i in range(20)] + [{"question": "0 + 1?", "answer": "5"}]
    save([*samples, *({**row(), "messages": turns("<image>0 + 1?")} for _ in range(2))], "a.jsonl")
    args = held_out.Namespace(test=None, output=tmp_path, held_out=4, search=0)
    dataset, _, _ = held_out.read_data(args, {"data": "a.jsonl"})
    marks = held_out.marks_of(dataset)
    groups = held_out.groups_of(marks)
    assert sorted(map(len, groups)) == [1] * 19 + [2, 2] and [0, 20] in groups and [21, 22] in groups
    assert held_out.in_common(marks[:1], marks) == 2
    assert json.dumps(groups) == json.dumps(sorted(groups))


def test_known_answers_that_cannot_be_marked_well_are_told(capsys, tmp_path):
    """Sentences, objects, lists; but not the last line of a chain, nor what is boxed."""
    loose = ["The two circles touch each other at one point, which lies on the line.", '{"a": 1, "b": 2}', "red\nblue"]
    chain = "The area of the square is 4, since its side is 2, and that of the triangle is half of it.\n2"
    marked = ["5", "<think>a\nb</think>\n\n5", chain, "a\n\n\\boxed{5}", "(B) 45", "[1, 2]"]
    assert [loose_answers.is_loose(answer) for answer in (*loose, *marked)] == [True] * 3 + [False] * 6
    save([{"question": f"{i}", "answer": answer} for i, answer in enumerate([*loose, *marked])], "a.jsonl")
    args = held_out.Namespace(test=None, output=tmp_path)
    held_out.read_data(args, {"data": "a.jsonl"})
    assert "note: 3 of the 9 known answers of a.jsonl are sentences, lists or objects" in capsys.readouterr().err
    assert loose_answers.note_of_loose(["5"] * 10 + loose[:1], "a") is None
