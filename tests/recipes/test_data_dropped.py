"""recipes/data.py: whatever cannot be used is dropped and counted, or an error."""

import json
from collections import Counter
from pathlib import Path

import chain_files
import pytest
from chain_files import ANSWER, ONE, encoded, load, pictures, pixels, processor, save, turns
from parts.layouts import BadSample
from parts.lengths import count_tokens, within_length
from parts.loading import Dropped, load_messages
from parts.template import check_template
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

folder = chain_files.folder  # fixture

RECIPES = Path(__file__).parents[2] / "recipes"
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
    "a truth": ({"messages": turns(True)}, "unknown layout", "has a turn that says 'True': a text or a list of parts"),
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


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_too_long_is_dropped_whole(streaming):
    rows = [{"messages": turns("how many ?" + " 1" * i), "images": ["images/0.png"]} for i in (0, 30, 3, 40)]
    file = save(rows, "a.jsonl")
    dataset, _ = load_messages(file, streaming=streaming)
    processing = processor()
    lengths = [count_tokens(sample["messages"], sample["images"], processing) for sample in dataset]
    images = processing.tokenizer.convert_tokens_to_ids("<image>")
    limit, dropped = lengths[2], Dropped()
    dropped["empty"] = 1
    kept = within_length(dataset, processing, limit, source=file, dropped=dropped)
    for _ in range(2):  # a stream may be read again
        samples = [*kept]
    assert [sample["messages"][0]["content"][1]["text"] for sample in samples] == ["how many ?", "how many ? 1 1 1"]
    assert dropped == {"empty": 1, f"longer than {limit} tokens": 2}
    collator = DataCollatorForVisionLanguageModeling(processing)
    whole = (collator([next(iter(dataset))])["input_ids"] == images).sum()
    assert all((collator([sample])["input_ids"] == images).sum() == whole for sample in samples)
    with pytest.raises(BadSample) as error:
        [*within_length(dataset, processing, limit, source=file, on_long="fail", dropped=Dropped())]
    assert str(error.value) == (
        f"sample 2 has {lengths[1]} tokens, its images' included, and max_tokens allows {limit}: "
        "allow more, or make the images smaller, or set on_long, in data.py --on-bad, to drop"
    )


def test_where_all_are_too_long_their_number_and_the_shortest_are_told():
    rows = [{"messages": turns("how many ?" + " 1" * i), "images": ["images/0.png"]} for i in (30, 20, 40)]
    dataset, dropped = load_messages(save([*rows, {"question": "a", "answer": ""}], "a.jsonl"), places=True)
    lengths = [count_tokens(sample["messages"], sample["images"], processor()) for sample in dataset]
    with pytest.raises(BadSample) as error:
        within_length(dataset, processor(), 20, source="a.jsonl", dropped=dropped)
    assert str(error.value) == (
        "no sample of a.jsonl is left: 1 empty answer (sample 4 of a.jsonl has a turn of the assistant that says "
        f"nothing); 3 longer than 20 tokens (sample 1 of a.jsonl has {lengths[0]} tokens, its images' included, and "
        f"max_tokens allows 20: allow more, or make the images smaller); the shortest has {lengths[1]} tokens"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_is_named_by_its_row_in_the_source(streaming):
    """Where others were dropped before it, and where it is too long or its answer not as the template has it."""
    rows = [{"messages": turns("how many ?" + " 1" * i), "images": ["images/0.png"]} for i in (0, 0, 30)]
    rows[0]["images"] = ["images/gone.png"]
    file = "a.jsonl"
    save(rows, file)
    dataset, dropped = load_messages(file, streaming=streaming, places=True)
    with pytest.raises(BadSample, match=f"^sample 3 of {file} has "):
        [*within_length(dataset, processor(), 60, source=file, on_long="fail", dropped=dropped)]
    stripped = processor()
    stripped.chat_template = "{{ messages[0].role }}"
    with pytest.raises(ValueError, match=f"^sample 2 of {file} would not be trained as it is written"):
        check_template(dataset, stripped)


def test_what_the_processor_refuses_is_dropped_like_what_is_too_long():
    Image.new("RGB", (4000, 4)).save("images/wide.png")
    rows = [{"messages": turns(), "images": [f"images/{name}.png"]} for name in ("0", "wide")]
    rows.append({"messages": turns("<image><image>which?"), "images": ["images/0.png", "images/wide.png"]})
    dataset, dropped = load_messages(save(rows, "a.jsonl"))
    refusing = processor("qwen2_5_vl")
    assert len(within_length(dataset, refusing, 100, source="a.jsonl", dropped=dropped)) == 1
    assert dropped == {"refused by the processor": 2}
    why = "is refused by the processor: absolute aspect ratio"
    seen = ["an image of 4000 x 4", "images of 10 x 12 and 4000 x 4"]
    for told, number, what in zip(dropped.sentences, (2, 3), seen, strict=True):
        assert told.startswith(f"sample {number}, with {what} pixels, {why}")
    none = "no sample of a.jsonl is left: 1 refused by the processor (sample 1"
    for only, on_long, told in ((dataset.select([1]), "drop", none), (dataset, "fail", "sample 2")):
        with pytest.raises(BadSample) as error:
            within_length(only, refusing, 100, source="a.jsonl", on_long=on_long, dropped=Dropped())
        assert str(error.value).startswith(f"{told}, with {seen[0]} pixels, {why}")


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
