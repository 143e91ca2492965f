"""What a sample holds is read, refused or named: chains of thought, options, foreign media, columns, odd types."""

import json
from pathlib import Path

import pytest
from chain_files import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.images import Root
from parts.layouts import LAYOUTS, BadSample, last_answer, read_sample

README = (Path(__file__).parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")


def turns(*contents, **last):
    said = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
    return {"messages": [*said[:-1], {**said[-1], **last}]}


def asked(read):
    return "".join(part["text"] or "" for part in read.messages[-2]["content"])


def test_the_documented_rows_are_read():
    rows = [line for line in LAYOUTS.splitlines() if line.startswith("  ")]
    assert len(rows) == 8
    for row in rows:
        read = read_sample(row)
        assert read.images == ["1.png"] and not read.unread and "How many?" in asked(read)
        assert last_answer(read.messages).removeprefix("<think>\n2 + 3 = 5\n</think>\n\n") in ("5", "B")
    assert "\n".join(line.strip() for line in LAYOUTS.splitlines()) in README


def test_prompt_and_completion_are_texts_or_turns_as_trl_has_them():
    question, answer = [{"role": "user", "content": "How many?"}], [{"role": "assistant", "content": "5"}]
    rules = [{"role": "system", "content": "Be short."}]
    later = [*answer, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    for prompt, completion, roles, last in (
        ("How many?", "5", "ua", "5"), (question, answer, "ua", "5"), (rules + question, answer, "sua", "5"),
        (question, "5", "ua", "5"), (question, later, "uaua", "Yes"),
    ):  # fmt: skip
        row = {"prompt": prompt, "completion": completion, "images": ["1.png"]}
        for sample in (row, json.dumps(row)):
            read = read_sample(sample)
            assert "".join(turn["role"][0] for turn in read.messages) == roles and last_answer(read.messages) == last
            assert read.images == ["1.png"] and not read.unread
    beside = read_sample({"question": "q", "answer": "7", "prompt": "template", "completion": "reason 6"})
    assert last_answer(beside.messages) == "7" and beside.unread.keys() == {"prompt", "completion"}
    both = read_sample({"prompt": "q", "completion": "7", "instruction": "template", "output": "6"})
    assert last_answer(both.messages) == "7" and both.unread == {"instruction": "template", "output": "6"}
    assert read_sample({**turns("q", "a"), "prompt": "b", "completion": "c"}).unread == {
        "prompt": "b",
        "completion": "c",
    }
    for prompt, completion, told in (
        ("How many?", 5, "no list of turns"), (["How many?"], "5", "no list of turns"), ("How many?", "", "name its"),
        ("How many?", [{"role": "tool", "content": "5"}], "has a turn whose role is 'tool'"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=told):
            read_sample({"prompt": prompt, "completion": completion})


def test_the_developer_is_the_system():
    row = {"messages": [{"role": "developer", "content": "Be short."}, *turns("q", "5")["messages"]]}
    assert [turn["role"] for turn in read_sample(row).messages] == ["system", "user", "assistant"]


def test_a_placeholder_too_many_and_one_too_few_have_other_ways_out():
    for text, images, told in (
        (
            "What is <image> in HTML?",
            [],
            "has 1 placeholder for 0 images: add the image, or take <image> out of the text",
        ),
        ("<image>?", ["1.png", "2.png"], "has 1 placeholder for 2 images: give each image its <image>"),
    ):
        with pytest.raises(BadSample, match=told):
            read_sample({**turns(text, "5"), "images": images})


THOUGHT = "<think>\n2 + 3 = 5\n</think>\n\n5"
CHAINS = [  # row, what is trained, what is evaluated
    (turns("q", "5", reasoning_content="2 + 3 = 5"), THOUGHT, "5"),
    (turns("q", "5", reasoning=" 2 + 3 = 5\n"), THOUGHT, "5"),
    (turns("q", "\n\n5", thinking="<think>2 + 3 = 5</think>"), THOUGHT, "\n\n5"),
    (turns("q", [{"type": "text", "text": "5"}], reasoning_content="2 + 3 = 5"), THOUGHT, "5"),
    (turns("q", THOUGHT, reasoning_content="2 + 3 = 5"), THOUGHT, THOUGHT),  # in both places
    (turns("q", "5", reasoning_content=None), "5", "5"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "5", "thinking": "2 + 3 = 5"}]},
     THOUGHT, "5"),
    ({"problem": "q", "solution": "2 + 3 = 5", "answer": "5"}, THOUGHT, "5"),
    ({"problem": "q", "solution": "2 + 3 = 5", "answer": 5}, THOUGHT, "5"),
    ({"question": "q", "rationale": "2 + 3 = 5", "answer": "5"}, THOUGHT, "5"),
    ({"question": "q", "answer": "5", "response": r"<think>2</think> \boxed{5}"}, r"<think>2</think> \boxed{5}", "5"),
    ({"question": "q", "answer": "5", "response": "<think>2</think> five"}, "<think>2</think> five\n\n5", "5"),
    ({"question": "q", "answer": "5", "solution": "<answer> 5 </answer>"}, "5", "5"),  # no chain: the same again
    ({"question": "q", "answer": "5", "solution": r"$\boxed{5}$"}, "5", "5"),
    ({"question": "q", "answer": "", "solution": "2 + 3 = 5"}, "2 + 3 = 5", "2 + 3 = 5"),
    ({"problem": "q", "solution": "5"}, "5", "5"),
    ({"instruction": "q", "output": "5", "cot": "2 + 3 = 5"}, THOUGHT, "5"),
    ({"question": "q", "instruction": "i", "answer": "5"}, "5", "5"),
    (turns("q", 5), "5", "5"),  # a number that nobody made a text
    ({"conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": 1.5}]}, "1.5", "1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "trained", "evaluated"), CHAINS)
def test_a_chain_of_thought_beside_the_answer_is_trained_and_not_evaluated(row, trained, evaluated):
    for sample in (row, json.dumps(row)):
        assert last_answer(read_sample(sample).messages) == trained
        assert last_answer(read_sample(sample, chains=False).messages) == evaluated
    assert read_sample(row).unread.keys() <= {"instruction"}


def test_the_input_of_an_instruction_is_part_of_the_question():
    for beside, expected in (
        ({"input": "1 + 2"}, "Add.\n1 + 2"),
        ({"input": ""}, "Add."),
        ({"input": None}, "Add."),
        ({}, "Add."),
    ):
        read = read_sample({"instruction": "Add.", "output": "3", **beside})
        assert asked(read) == expected and last_answer(read.messages) == "3" and not read.unread


def test_a_chain_in_an_earlier_turn_stays():
    row = {"messages": [*turns("q", "5", thinking="a")["messages"], *turns("sure?", "5", thinking="b")["messages"]]}
    for chains, last in ((True, "<think>\nb\n</think>\n\n5"), (False, "5")):
        messages = read_sample(row, chains).messages
        assert last_answer(messages[:2]) == "<think>\na\n</think>\n\n5" and last_answer(messages) == last


RED = "which?\nA. red\nB. blue"
OPTIONS = [  # row, question, answer
    ({"options": ["red", "blue"], "answer": "B"}, RED, "B"),
    ({"choices": ["red", "blue"], "answer": "blue"}, RED, "blue"),
    ({"choices": ["red", "blue"], "answer": 1}, RED, "B"),
    ({"choices": ["red", "blue", None], "answer": 1.0}, RED, "B"),  # of a table
    ({"choices": ["red", "blue"], "answer": "0"}, RED, "A"),
    ({"options": ["A. red", "(B) blue"], "answer": "(B)"}, RED, "(B)"),
    ({"options": {"A": "red", "B": "blue"}, "answer": "A"}, RED, "A"),
    ({"choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answer": "A"}, RED, "A"),
    ({"options": "['red', 'blue']", "answer": "A"}, RED, "A"),
    ({"options": '["red", "blue"]', "answer": "A"}, RED, "A"),
    ({"options": "A. red\nB. blue", "answer": "A"}, RED, "A"),
    ({"A": "red", "B": "blue", "C": None, "answer": "A"}, RED, "A"),
    ({"option_a": "red", "option_b": "blue", "answer": "A"}, RED, "A"),
    ({"options": [2, 4, 6], "answer": 4}, "which?\nA. 2\nB. 4\nC. 6", "4"),  # no index
    ({"options": [], "answer": "5"}, "which?", "5"),
    ({"question": RED, "options": ["red", "blue"], "answer": 0}, RED, "A"),  # there already
    ({"A": "a grade", "answer": "5"}, "which?", "5"),
]
DIGITS, SIZES = ["1", "2", "3"], [1.5, 1.0]
CHOSEN = [  # options, answer, what is read; None where its text is one option, and the index another
    *((DIGITS, answer, letter) for answer, letter in ((0, "A"), (1, "B"), (2, "C"), (1.0, "B"))),
    *((DIGITS, answer, read) for answer, read in (("0", "A"), ("1", None), (" 2 ", None), ("3", "3"), ("B", "B"))),
    *(([1, 2, 3], answer, read) for answer, read in ((0, "A"), (1, None), (2, None), (3, "3"))),
    *(([1, 2, 3], answer, read) for answer, read in (("0", "A"), ("1", None), ("3", "3"))),
    *((["0", "1"], answer, read) for answer, read in ((0, "A"), (1, "B"), ("0", "0"), ("1", "1"))),  # all the same
    *(([0, 1], answer, read) for answer, read in ((0, "0"), ("1", "1"))),
    *((SIZES, answer, read) for answer, read in ((1.5, "1.5"), (1.0, "1.0"), (0, "A"))),
    (["A. 2", "B. 1"], 1, "B"), (["A. 2", "B. 1"], "1", "1"), (["A. 1", "B. 2"], "1", None), ("[1, 2]", 1, None),
    (["yes", "1", "0"], "1", "1"), (["yes", "1", "0"], "2", "C"), (["yes", "1", "0"], True, "True"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "question", "answer"), OPTIONS)
def test_options_are_part_of_the_question(row, question, answer):
    read = read_sample({"question": "which?", **row})
    assert (asked(read), last_answer(read.messages)) == (question, answer)


@pytest.mark.parametrize(("options", "answer", "expected"), CHOSEN)
def test_a_number_beside_options_that_are_numbers_has_one_reading_or_none(options, answer, expected):
    row = {"question": "which?", "choices": options, "answer": answer}
    if expected is not None:
        assert last_answer(read_sample(row).messages).strip() == expected
        return
    with pytest.raises(BadSample, match=r"is the text of one option and the index of [BC]: write its letter") as error:
        read_sample(row)
    assert error.value.reason == "ambiguous answer"


REFUSED = [  # row, reason, what the sentence says
    ({"question": "q", "options": ["red", "blue"], "answer": 2}, "answer is no option", "the answer 2, and 2 options"),
    ({"question": "q", "options": ["red", "blue"], "answer": -1}, "answer is no option", "the answer -1"),
    ({"question": "q", "options": ["3", "4"], "answer": 4}, "answer is no option", "the answer 4, and 2 options"),
    ({"question": "q", "options": ["red"], "answer": "A"}, "unknown options", "options that are \"['red']\""),
    ({"question": "q", "options": ["red", {"bytes": "x"}], "answer": "A"}, "unknown layout", "option B that is"),
    ({"question": ["q"], "answer": "5"}, "unknown layout", "has question that is"),
    ({"question": "q", "answer": {"a": "5"}}, "unknown layout", "has answer that is"),
    ({**turns("<image>q", "5"), "videos": ["a.mp4"]}, "video or audio", "has videos, which are not read"),
    ({"question": "q", "answer": "5", "audio": {"bytes": "x"}}, "video or audio", "has audio, which"),
    (turns("<video>q", "5"), "video or audio", "a placeholder <video>"),
    (turns("<image 1> q", "5"), "placeholders != images", "a placeholder <image 1>: write <image>"),
    (turns("q", None, reasoning_content="cut"), "empty answer", "says nothing"),
    (turns("q", "5", reasoning_content=["a"]), "unknown layout", "a turn whose reasoning_content is"),
    (turns("q", "<think>a</think>5", reasoning_content="b"), "two chains of thought", "another one beside it"),
    (turns("half \ud83d", "5"), "broken text", r"lone surrogate: …half \ud83d…"),
    (turns("q", "5 \udfff"), "broken text", "lone surrogate"),
    ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown layout", "whose role is ['user']"),
    ({"messages": [{"role": {}, "content": "q"}]}, "unknown layout", "whose role is {}"),
    ({**turns("q", "5"), "system": 5}, "unknown layout", "a system that is '5'"),
    ("[" * 100_000, "broken JSON", "is no valid JSON"),
    ({"messages": "[" * 100_000}, "unknown layout", "no list of turns"),
]


@pytest.mark.parametrize(("row", "reason", "sentence"), REFUSED)
def test_what_would_be_lost_or_break_is_refused_in_a_sentence(row, reason, sentence):
    with pytest.raises(BadSample) as error:
        read_sample(row)
    assert error.value.reason == reason and sentence in str(error.value) and str(error.value).isprintable()


def test_text_that_is_not_read_is_named():
    row = {**turns("q", "5", name="ann", weight=1), "id": "a7", "n": 7, "hint": "look\x1b[31m", "images": []}
    row |= {"tag": [""], "meta": {"by": ["x"]}}
    assert read_sample(row).unread == {
        "messages[].name": "ann", "id": "a7", "hint": r"look\x1b[31m", "meta": "{'by': ['x']}"
    }  # fmt: skip


Q, PNG = {"question": "q", "answer": "5"}, "data:image/png;base64,AAAA"
UNREAD = [  # row, key that its sentence names
    ({**Q, "image_path": "a/1.png"}, "image_path"), ({**Q, "img": "1.JPG"}, "img"), ({**Q, "photo": PNG}, "photo"),
    ({**turns("q", "5"), "image_paths": ["1.png", "2.png"]}, "image_paths"), ({**Q, "scan": encoded(1)}, "scan"),
    ({**Q, "decoded": {"bytes": encoded(1), "path": None}}, "decoded"), ({**Q, "scan": {"path": "1.png"}}, "scan"),
    ({**Q, "image": "1.png", "image_2": "2.png"}, "image_2"), ({**Q, "image": "1.png", "images2": "2.png"}, "images2"),
    ({**Q, "image": encoded(1), "image_2": {"bytes": encoded(2), "path": None}}, "image_2"),
    ({**Q, "image_url": "https://x.org/1.png"}, "image_url"), ({**Q, "imagePath": "1.png"}, "imagePath"),
    ({"messages": [{"role": "user", "content": "q", "images": ["1.png"]}, *turns("q", "5")["messages"][1:]]},
     "messages[].images"),
    ({**Q, "id": "images/1.png"}, "id"), ({**Q, "figures": ["images/1.png", "a"]}, "figures"),  # which are there
    ({**Q, "img": "with space.png"}, "img"),
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A folder with three pictures, and one beside it."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    for name in ("images/1.png", "images/2.png", "with space.png", "../outside.png"):
        (tmp_path / "set" / name).write_bytes(encoded(1))
    return Root(str(tmp_path / "set"), "set")


@pytest.mark.parametrize(("row", "key"), UNREAD)
def test_an_image_under_another_key_is_not_left_out(row, key, root):
    with pytest.raises(BadSample) as error:
        read_sample(row, root=root)
    told = "put all images of a sample under images, or take it out"
    assert str(error.value) == f"has an image under {key}, which is not read: {told}"
    assert error.value.reason == "image not read"


PART = {"type": "image", "path": "1.png"}
NOTED = [  # what is no image, or another one than that of the question
    ({**Q, "md5": b"\1\2"}, []), ({**Q, "hint": "the chart is in chart.png"}, []), ({**Q, "id": "x.jpg"}, []),
    ({**Q, "image_id": "x.jpg"}, []), ({**Q, "image_caption": "It shows a.png"}, []), ({**Q, "tags": ["y.jpg"]}, []),
    ({**Q, "metadata": {"path": "y.jpg", "page": 3}}, []), ({**Q, "url": "https://x.org/1.png"}, []),
    ({**Q, "name": "../outside.png"}, []), (turns("q", "5", name="x.png"), []),
    *(({**Q, "image": "1.png", key: "images/2.png"}, ["1.png"]) for key in ("mask", "file_name", "image_path")),
    ({**Q, "images": ["1.png"], "image": "2.png", "img": {"bytes": encoded(2), "path": None}}, ["1.png"]),
    ({**turns([PART, {"type": "text", "text": "q"}], "5"), "file_name": "COCO_1.jpg"}, ["1.png"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "images"), NOTED)
def test_what_only_looks_like_an_image_is_noted(row, images, root):
    read = read_sample(row, root=root)
    assert read.images == images and read.unread


@pytest.mark.parametrize(
    ("row", "images"),
    [({**Q, "file_name": "a 1.png"}, ["a 1.png"]),  # as datasets has it, in the metadata.jsonl beside a folder of them
     ({**Q, "images": [], "image": "1.png"}, ["1.png"]),
     ({**Q, "file_name": "part-1.txt"}, []),
     ({**Q, "image": "1.png", "image_2": "train/1.png", "hint": "see\n2.png"}, ["1.png"]),
     ({**Q, "image": "1.png", "image_2": "1.png", "url": "https://x.org/2.png"}, ["1.png"]),
     ({**Q, "image": encoded(1), "image_2": "1.png"}, [encoded(1)]),
     ({**Q, "image": "1.png", "image_2": {"bytes": encoded(1), "path": None}}, ["1.png"]),
     ({**Q, "image": {"bytes": encoded(1), "path": "1.png"}, "image_2": {"bytes": encoded(1), "path": "2.png"}},
      [{"bytes": encoded(1), "path": "1.png"}])],
)  # fmt: skip
def test_the_same_image_in_two_places_is_one(row, images):
    assert read_sample(row).images == images


KEYS = ["messages", "role", "content", "from", "value", "type", "text", "image", "image_url", "url", "images"]
KEYS += ["question", "answer", "solution", "options", "system", "reasoning_content", "videos", "A", "B", "label"]
TEXTS = st.sampled_from(["user", "assistant", "system", "text", "image", "<image>", "", ".", "B", "1", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"role": TEXTS | VALUES, "content": VALUES}, optional={"reasoning_content": VALUES})
SAMPLES = st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(TURN, max_size=4), max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SAMPLES, st.booleans())
def test_values_of_any_type_are_a_sample_or_a_sentence(sample, chains):
    try:
        read = read_sample(sample, chains)
    except BadSample as error:
        assert str(error).isprintable()
    else:
        assert [turn["role"] for turn in read.messages][-1] == "assistant" and last_answer(read.messages).strip()
        json.dumps(read.messages, ensure_ascii=False).encode()
