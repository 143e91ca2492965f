"""recipes/data.py: every common layout becomes what TRL takes, and the command line writes a file that stands alone."""

import base64
import copy
import json

import chain_files
import data
import datasets
import pytest
from chain_files import (
    ANSWER,
    BOXED,
    IMAGE,
    ONE,
    encoded,
    load,
    picture,
    pictures,
    pixels,
    processor,
    save,
    text,
    turns,
)
from parts.lengths import count_tokens
from parts.loading import FEATURES, load_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

folder = chain_files.folder  # fixture

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
    assert ["dropped, empty answer", "2", "sample 2 of a.jsonl has a turn of the assistant that says nothing"] in rows


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_what_is_too_long_for_a_base_is_dropped_and_lengths_are_told(streaming, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name, **settings: processor())
    rows = [{"messages": turns(answer=ANSWER + " 1" * i), "images": ["images/0.png"]} for i in (30, 0, 1)]
    output = tmp_path / "out.parquet"
    more = ["--model", "base", "--max-tokens", "60", "--json", "--overwrite", *streaming]
    printed = json.loads(
        run(save([{"question": "a", "answer": ""}, *rows], "a.jsonl"), "-o", output, *more, capsys=capsys)
    )
    assert (printed["kept"], printed["dropped"]) == (2, {"empty answer": 1, "longer than 60 tokens": 1})
    assert printed["first"]["longer than 60 tokens"].startswith("sample 2 of a.jsonl has ")
    longest = printed["tokens"] and printed["tokens"]["longest"]
    assert streaming or (printed["tokens"] == {"longest": longest, "95 %": longest} and longest > 60)
    assert pixels(load_messages(output)[0][0]) == pictures(0)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_processor_of_one_channel_counts_and_the_file_keeps_its_colours(streaming, tmp_path, capsys, monkeypatch):
    gray = copy.deepcopy(processor("qwen2_5_vl"))
    gray.image_processor.image_mean = gray.image_processor.image_std = [0.5]
    gray.image_processor.do_convert_rgb = False
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name, **settings: gray)
    rows = [{"messages": turns(), "images": [f"images/{i}.png"]} for i in range(3)]
    output = tmp_path / "out.parquet"
    more = ["--model", "base", "--json", *streaming]
    printed = json.loads(run(save(rows, "a.jsonl"), "-o", output, *more, capsys=capsys))
    assert (printed["kept"], printed["dropped"]) == (3, {})
    plain = datasets.load_dataset("parquet", data_files=str(output), split="train")
    assert plain.features == FEATURES and [pixels(sample)[0] for sample in plain] == pictures(0, 1, 2)


SILENT = "sample 1 of a.jsonl has a turn of the assistant that says nothing"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["-o", "out.txt"], "output out.txt is no parquet file: name one, such as out.parquet"),
     (["-o", "no/out.parquet"], "output no/out.parquet cannot be written: there is no folder no"),
     (["-o", "there.parquet"], "output there.parquet exists: name another file, or pass --overwrite"),
     (["-o", "out.parquet", "--on-bad", "fail"], SILENT),
     (["-o", "out.parquet", "--images", "no"], "images no is no folder"),
     (["-o", "out.parquet", "--split", "validation"],
      "a.jsonl has no splits, so split validation cannot be taken of it: leave split out, or name the file or folder "
      "of that split as the data"),
     (["-o", "out.parquet", "--model", "base", "--chat-template-path", "no.jinja"],
      "chat_template_path=no.jinja is no .jinja file that is here: name one; a model's folder has one, "
      "chat_template.jinja"),
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
