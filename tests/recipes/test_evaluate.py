"""recipes/evaluate.py: a small model that really reads pictures, and what cannot be evaluated."""

import json
import shutil
from argparse import Namespace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import datasets
import evaluate
import numpy as np
import pytest
import score
import torch
from parts.outputs import read_outputs
from parts.teachers import Local
from peft import IA3Config, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import drift_peft.demo
from drift_peft import make_keep_set
from drift_peft.demo.world import Digits, make_samples

RECIPES = Path(__file__).parents[2] / "recipes"

PATCHES = "visual.patch_embed.proj.weight"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's model, which reads rows of handwritten digits in grey, as the same function of pictures in colour."""
    folder = tmp_path_factory.mktemp("demo") / "vlm"
    shutil.copytree(Path(drift_peft.demo.__file__).parent / "checkpoints" / "vlm", folder)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    weights[PATCHES] = weights[PATCHES].repeat(1, 3, 1, 1, 1) / 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file, *changed in (
        ("config.json", ('"in_channels": 1', '"in_channels": 3'), ('"bfloat16"', '"float32"')),
        ("processor_config.json", ("      0.5\n", "      0.5, 0.5, 0.5\n")),
    ):
        text = (folder / file).read_text()
        for old, new in changed:
            assert old in text
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven rows to read and seven sums, of different lengths, with their answers."""
    folder = tmp_path_factory.mktemp("data")
    rng, digits, lines = np.random.default_rng(0), Digits("test"), []
    for i, sample in enumerate(make_samples(7, ["sum"], rng, digits) + make_samples(7, ["read"], rng, digits)):
        sample.image.save(folder / f"{i}.png")
        line = {"problem": f"<image>{sample.question}", "answer": sample.answer, "image": f"{i}.png"}
        lines.append(json.dumps({**line, "category": sample.task, "level": None}))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "test.jsonl"


def run(model, data, output, *flags):
    usual = ["--model", model, "--data", data, "-o", output, "--prompt", "", "--max_new_tokens", "24"]
    evaluate.main([*map(str, usual), *flags])
    return json.loads(Path(output).read_text())


@pytest.fixture(scope="module")
def result(model, data, tmp_path_factory):
    """batch size -> what a run with it wrote; each runs once."""
    folder = tmp_path_factory.mktemp("results")
    return cache(lambda size: run(model, data, folder / f"{size}.json", "--batch_size", str(size)))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*map(str, arguments)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and error.startswith("evaluate.py: error: ")
    return error


def test_batches_answer_as_single_questions_do(result):
    def said(size):
        return [(sample["index"], sample["response"], sample["finish_reason"]) for sample in result(size)["samples"]]

    assert said(1) == said(5) and len({len(response) for _, response, _ in said(5)}) > 3


def test_the_result_counts_what_its_samples_say(result, data):
    found, lines = result(5), [json.loads(line) for line in data.read_text().splitlines()]
    samples = found["samples"]
    for sample, line in zip(samples, lines, strict=True):
        gold = line["answer"].partition(r"\boxed{")[2].rstrip("}") or line["answer"]
        answer = sample["response"].partition(r"\boxed{")[2].rstrip("}") or sample["response"]
        assert (sample["gold"], sample["correct"]) == (gold, answer == gold)
        assert (sample["category"], sample["question"]) == (line["category"], line["problem"])
        assert (sample["finish_reason"], sample["unfinished"]) == ("stop", False)
    read, sums = found["categories"]["read"], found["categories"]["sum"]
    assert read["samples"] == sums["samples"] == 7
    assert read["correct"] >= 6 and 0 < sums["correct"] < 7  # it was trained to read; its sums are a transfer from text
    assert found["total"]["correct"] == read["correct"] + sums["correct"] == sum(s["correct"] for s in samples)
    assert found["total"]["accuracy"] == round(100 * found["total"]["correct"] / 14, 2)
    assert found["scorer"]["rules"] >= 1 and found["max_new_tokens"] == 24


def test_thinking_that_the_chat_template_opens_and_that_never_ends_is_unfinished(model, data, tmp_path):
    thinking = shutil.copytree(model, tmp_path / "thinking")
    template, end = thinking / "chat_template.jinja", "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    template.write_text(template.read_text().rstrip() + end)
    samples = run(thinking, data, tmp_path / "r.json")["samples"]
    assert all(sample["response"].startswith("<think>\n") for sample in samples)
    never_ends = ["</think>" not in sample["response"] for sample in samples]
    assert 0 < sum(never_ends) < 14 and [sample["unfinished"] for sample in samples] == never_ends
    local = Local(str(thinking), batch_size=1, temperature=0.0, max_tokens=1)
    local.load()
    local.processor.batch_decode = lambda tokens, **_: ["\n<think> 5 </think> 6"]
    [answer] = local([([{"role": "user", "content": [{"type": "text", "text": "?"}]}], [])])
    assert answer["response"] == "\n<think> 5 </think> 6"  # of a model that opens it once more


def test_the_table_has_a_row_for_each_category(result, capsys):
    evaluate.Console().print(evaluate.results_table(result(5)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = {**result(5)["categories"], "total": result(5)["total"]}
    assert [*shown] == ["read", "sum", "total"]
    for name, numbers in shown.items():
        assert [name, *(str(numbers[key]) for key in ("samples", "correct", "accuracy", "unfinished"))] in rows


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_categories_come_from_any_kind_of_file(form, tmp_path):
    rows, file = [{"question": "?", "level": level} for level in ("3", None, "1")], tmp_path / f"data.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]")
    assert evaluate.read_categories(str(file), "test", "level") == ["3", "all", "1"]
    assert evaluate.read_categories(str(file), "test", None) == ["all"] * 3
    with pytest.raises(ValueError, match=r"no sample of .* has the category subject"):
        evaluate.read_categories(str(file), "test", "subject")


def test_score_reads_the_result(result, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(result(5)))
    ((name, answers),) = read_outputs(tmp_path / "r.json").items()
    assert name == "test" and [answer.response for answer in answers] == [s["response"] for s in result(5)["samples"]]


def test_a_run_goes_on_where_it_stopped(model, data, result, tmp_path, monkeypatch, capsys):
    asked, answer = [], Local._answer

    def dying(self, conversations):
        if len(asked) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        asked.extend(conversations)
        return answer(self, conversations)

    monkeypatch.setattr(Local, "_answer", dying)
    arguments = ("--model", model, "--data", data, "-o", tmp_path / "r.json", "--prompt", "", "--max_new_tokens", "24")
    assert "a batch of 3 does not fit into memory: take a smaller --batch-size" in refusal(
        capsys, *arguments, "--batch_size", "3"
    )
    assert len(asked) == 6 and not (tmp_path / "r.json").exists()
    monkeypatch.setattr(Local, "_answer", lambda self, batch: asked.extend(batch) or answer(self, batch))
    found = run(model, data, tmp_path / "r.json", "--batch_size", "4")
    assert len(asked) == 14 and found["samples"] == result(5)["samples"]
    monkeypatch.setattr(evaluate, "open_model", None)  # nothing is left to ask
    assert run(model, data, tmp_path / "r.json") == found
    assert "holds answers of other settings: max_new_tokens (24, now 8)" in refusal(capsys, *arguments[:-1], "8")
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(data.read_text().splitlines()[:2]))
    told = refusal(capsys, *arguments[:2], "--data", few, *arguments[4:], "--images", data.parent)
    assert f"holds answers of other settings: data_sha256 ({few} has other samples): take the earlier ones, or" in told


def test_answers_are_greedy_whatever_the_models_own_settings_say(model, data, result, tmp_path, monkeypatch):
    """Categories are no other questions."""
    folder = shutil.copytree(model, tmp_path / "model")
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"do_sample": True, "top_k": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 20}
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = run(folder, data, tmp_path / "r.json", "--batch_size", "5")
    assert found["samples"] == result(5)["samples"]
    monkeypatch.setattr(evaluate, "open_model", None)  # nothing is left to ask
    assert len(run(folder, data, tmp_path / "r.json", "--category", "image")["categories"]) == 14


def test_a_keep_set_whose_batch_does_not_fit_is_one_sentence(model, data, tmp_path, monkeypatch, capsys):
    make_keep_set(model, data.parent, tmp_path / "k.safetensors", max_new_tokens=2, top_k=4, progress=False)
    monkeypatch.setattr("drift_peft.keeping.measure", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    arguments = ("--model", model, "--keep", tmp_path / "k.safetensors", "-o", tmp_path / "r.json")
    assert "a batch of 3 does not fit into memory: take a smaller --batch-size" in refusal(
        capsys, *arguments, "--batch_size", "3"
    )
    assert not (tmp_path / "r.json").exists()


def test_a_keep_set_writes_over_no_result_of_an_exam(model, data, result, tmp_path, capsys, monkeypatch):
    """Nor where a stopped exam is to write, nor over another distance; a finished exam writes its own again."""
    make_keep_set(model, data.parent, keep := tmp_path / "k.safetensors", max_new_tokens=2, top_k=4, progress=False)
    output, journal = tmp_path / "r.json", tmp_path / "r.json.journal.jsonl"
    exam = run(model, data, output, "--batch_size", "14")
    asked = ("--model", model, "--keep", keep, "-o")
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        assert refusal(capsys, *asked, output).endswith(f"output {output} exists: name another file")
        assert json.loads(output.read_text()) == exam == run(model, data, output)
        output.unlink()
        told = f"{journal} holds answers of an exam whose result is to be {output}: name another file"
        assert refusal(capsys, *asked, output).endswith(told)
    evaluate.main([*map(str, asked), str(tmp_path / "kept.json")])
    kept = (tmp_path / "kept.json").read_text()
    assert "exists: name another file" in refusal(capsys, *asked, tmp_path / "kept.json")
    told = "kept.json exists, and has no journal to go on from: name another file"
    assert told in refusal(capsys, "--model", model, "--data", data, "-o", tmp_path / "kept.json")
    assert (tmp_path / "kept.json").read_text() == kept and not output.exists()


@pytest.mark.parametrize("asked", [pytest.param("keep", marks=pytest.mark.slow), "data"])
def test_a_model_that_does_not_load_is_no_fault_of_the_batch(asked, model, data, tmp_path, monkeypatch, capsys):
    """Nor is anything answered then."""
    make_keep_set(model, data.parent, keep := tmp_path / "k.safetensors", max_new_tokens=2, top_k=4, progress=False)
    source = {"keep": ("--keep", keep), "data": ("--data", data, "--images", data.parent)}[asked]
    arguments = ("--model", model, *source, "-o", tmp_path / "r.json")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", Mock(side_effect=OSError("no weights there")))
    assert refusal(capsys, *arguments).endswith(f"the model {model} cannot be loaded: no weights there")
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", Mock(side_effect=full))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.main([*map(str, arguments)])


def test_a_distance_that_is_nothing_has_no_sign():
    """KL of float32 may come out a little below zero."""
    numbers = {"answers": 2, "kl": -1e-9, "kl_interval": [-2e-8, 1e-9], "agreement": 1, "agreement_interval": [1, 1]}
    columns = evaluate.keeping_table({"keep": "k", "kept": {"model": {"total": numbers}}}).columns
    assert list(columns[3].cells) == ["0.000 [0.000, 0.000]"]


def test_cut_answers_are_unfinished(model, data, tmp_path, capsys):
    found = run(model, data, tmp_path / "r.json", "--max_new_tokens", "3", "--batch_size", "14")
    assert all(sample["unfinished"] and not sample["correct"] for sample in found["samples"][:7])
    assert found["categories"]["sum"]["unfinished"] == 7 <= found["total"]["unfinished"]
    assert "answers are unfinished: 14 were cut at 3 tokens: see --max-new-tokens" in capsys.readouterr().err


def test_what_is_unfinished_is_told_with_what_helps():
    """The prompt only where most are, and where it is the default one."""
    cut, fine = ("so it is", "length"), ("12", "stop")
    many = "note that it may be 1, or 2, or any other of the numbers that were not asked for, since the"
    more, open_end, prompt = "were cut at 9 tokens: see --max-new-tokens", "ended without an answer", "default --prompt"
    for said, asked, told in (
        ([cut, fine, fine], evaluate.PROMPT, ["1 of 3", more]), ([cut] * 3, evaluate.PROMPT, ["3 of 3", more, prompt]),
        ([(many, "stop"), fine], evaluate.PROMPT, ["1 of 2", open_end, prompt]), ([cut] * 2, "", ["2 of 2", more]),
        ([cut, (many, "stop"), fine, fine, fine], evaluate.PROMPT, ["2 of 5", f"1 {more}", f"1 {open_end}"]),
    ):  # fmt: skip
        questions = [evaluate.Question(i, "?", "12", "all") for i in range(len(said))]
        answers = {str(i): {"response": text, "finish_reason": reason} for i, (text, reason) in enumerate(said)}
        samples = evaluate.mark_all(questions, answers)
        note = evaluate.unfinished_note({"samples": samples, "prompt": asked, "max_new_tokens": 9})
        assert all(part in note for part in told)
        assert [part in note for part in (more, open_end, prompt)] == [
            any(part in each for each in told) for part in (more, open_end, prompt)
        ]


@pytest.mark.parametrize("response, reason, found", [
    ("The answer is 12", "stop", (True, False, "sentence")),
    ("The answer is 12", "length", (False, True, "unfinished")),
    ("The answer is 12. This", "length", (True, False, "sentence")), (r"\boxed{12}", "length", (True, False, "boxed")),
])  # fmt: skip
def test_an_answer_at_the_end_of_a_cut_response_may_be_part_of_one(response, reason, found):
    question = evaluate.Question(0, "?", "12", "all")
    (sample,) = evaluate.mark_all([question], {"0": {"response": response, "finish_reason": reason}})
    assert (sample["correct"], sample["unfinished"], sample["read_by"]) == found
    counted = evaluate.summarize([sample])["total"]["read_by"]
    assert [rule for rule, number in counted.items() if number] == [found[2]]


def test_score_counts_cut_answers_as_evaluate_does(tmp_path):
    """Right and cut within, right and cut later, wrong and cut, right and ended."""
    said = [("The answer is 12", "length"), (r"\boxed{12}", "length"), (r"\boxed{7}", "length"), ("12", "stop")]
    questions = [evaluate.Question(i, "?", "12", "all") for i in range(len(said))]
    answers = {str(i): {"response": text, "finish_reason": reason} for i, (text, reason) in enumerate(said)}
    samples = evaluate.mark_all(questions, answers)
    total = evaluate.summarize(samples)["total"]
    result = {"data": "own.jsonl", "scorer": {}, "samples": samples}
    (tmp_path / "r.json").write_text(json.dumps(result))
    found = read_outputs(tmp_path / "r.json")
    column = score.score({"base": found, "DRIFT": found})["columns"]["own"]
    assert column["scores"]["base"] == total["accuracy"] == 50.0
    assert column["unfinished"]["base"] == total["unfinished"] == 2 and column["read_by"]["base"] == total["read_by"]


def test_a_folder_with_an_at_sign_is_no_revision(model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model@2")
    assert run(folder, data, tmp_path / "r.json", "--batch_size", "14")["total"]["samples"] == 14


def test_an_adapter_is_put_on_the_model_and_another_one_is_not_taken_for_it(model, data, result, tmp_path, capsys):
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=5.0)
    lora.save_pretrained(tmp_path / "adapter")
    found = run(model, data, tmp_path / "r.json", "--adapter", str(tmp_path / "adapter"), "--batch_size", "14")
    assert found["adapter"] == str(tmp_path / "adapter")
    assert [s["response"] for s in found["samples"]] != [s["response"] for s in result(5)["samples"]]
    for name, weight in lora.named_parameters():
        weight.data *= 2 if "lora_B" in name else 1
    lora.save_pretrained(tmp_path / "adapter")
    usual = ("--model", model, "--data", data, "-o", tmp_path / "r.json", "--prompt", "", "--max_new_tokens", "24")
    told = f"holds answers of other settings: adapter_files ({tmp_path / 'adapter'} has others now): take the earlier"
    assert told in refusal(capsys, *usual, "--adapter", tmp_path / "adapter")


def test_an_adapter_is_not_put_on_another_model_than_its_own(model, data, tmp_path, capsys):
    other, adapter = shutil.copytree(model, tmp_path / "other"), tmp_path / "adapter"
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(adapter)
    usual = ("--model", other, "--adapter", adapter, "-o", tmp_path / "r.json", "--batch-size", "14")
    make_keep_set(model, data.parent, tmp_path / "k.safetensors", max_new_tokens=2, top_k=4, progress=False)
    for questions in (("--data", data), ("--keep", tmp_path / "k.safetensors")):
        told = refusal(capsys, *usual, *questions)
        assert f"adapter {adapter} was trained on {model}, and base {other} has another" in told
        assert "name the model that it was trained on, or pass force=True (--force)" in told
    assert not [*tmp_path.glob("r.json*")]
    run(other, data, tmp_path / "forced.json", "--adapter", str(adapter), "--force", "--batch-size", "14")


def test_an_adapter_that_does_not_fit_is_refused(model, data, tmp_path, capsys):
    """PEFT loads it with a warning, and what has no place in the model is not there."""
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.97"): t for name, t in load_file(file).items()}, file)
    asked = ("--model", model, "--adapter", tmp_path / "adapter", "--data", data, "-o", tmp_path / "r.json")
    assert f"does not fit the base {model}: the base has no layers.97" in refusal(capsys, *asked, "--batch-size", "14")


def test_where_a_model_cannot_be_compared_with_the_adapters_own_that_is_said(model, data, tmp_path, capsys):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForImageTextToText.from_pretrained(model), config).save_pretrained(tmp_path / "ia3")
    run(model, data, tmp_path / "r.json", "--adapter", str(tmp_path / "ia3"), "--batch-size", "14")
    told = capsys.readouterr().err
    assert f"note: whether {tmp_path / 'ia3'} was trained on {model} is not known: adapter" in told


def test_a_result_in_the_folder_of_what_is_asked_makes_it_no_other_one(model, data, tmp_path, capsys):
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    folder = shutil.copytree(model, tmp_path / "model")
    for place, flags in ((folder, ()), (tmp_path / "adapter", ("--adapter", str(tmp_path / "adapter")))):
        found = run(model if flags else folder, data, place / "r.json", *flags, "--batch_size", "14")
        (place / "README.md").write_text("Written later.")
        assert run(model if flags else folder, data, place / "r.json", *flags) == found
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "processor_config.json",
    ):
        before = evaluate.stamp(folder)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        assert evaluate.stamp(folder) != before, name
    before = evaluate.stamp(folder)
    (folder / "chat_template.jinja").write_text("another")
    assert evaluate.stamp(folder) != before


def test_an_adapter_is_asked_with_the_tokens_that_it_was_trained_with(model, tmp_path):
    """But with the model's processor if it has no more than a tokenizer, as an expert on text has."""
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    how = {"batch_size": 1, "trust_remote_code": False, "force": False, "max_new_tokens": 1, "processor_kwargs": None}
    args = Namespace(model=str(model), adapter=tmp_path, **how)
    processor = evaluate.open_model(args).processor
    before = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<of its own>"])
    for saved, added in ((processor.tokenizer, 0), (processor, 1)):
        saved.save_pretrained(tmp_path)
        assert len(evaluate.open_model(args).processor.tokenizer) == before + added


def test_settings_of_the_processor_are_those_of_a_trained_one_too(model, data, tmp_path, capsys):
    """Or models are examined at two resolutions: one with a processor saved beside its adapter, one without."""
    lora = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    AutoProcessor.from_pretrained(model, max_pixels=144).save_pretrained(tmp_path / "adapter")
    how = {
        "batch_size": 1,
        "trust_remote_code": False,
        "force": False,
        "max_new_tokens": 1,
        "processor_kwargs": {"max_pixels": 576},
    }
    for adapter in (None, tmp_path / "adapter"):
        local = evaluate.open_model(Namespace(model=str(model), adapter=adapter, **how))
        assert local.processor.image_processor.size["longest_edge"] == 576
    run(model, data, tmp_path / "r.json", "--batch-size", "14", "--processor-kwargs", '{"max_pixels": 576}')
    usual = ("--model", model, "--data", data, "-o", tmp_path / "r.json", "--prompt", "", "--max_new_tokens", "24")
    assert "holds answers of other settings: processor_kwargs ({'max_pixels': 576}, now None)" in refusal(
        capsys, *usual
    )
    new = (*usual[:5], tmp_path / "n.json")
    assert "has no setting max_pixel: did you mean max_pixels?" in refusal(
        capsys, *new, "--processor-kwargs", '{"max_pixel": 1}'
    )
    with pytest.raises(SystemExit, match=r"--processor-kwargs takes a JSON object, such as .*, got max_pixels=5"):
        evaluate.main([*map(str, new), "--processor-kwargs", "max_pixels=5"])


@pytest.fixture
def broken(model, data, tmp_path):
    """name -> arguments of a run that cannot be."""
    Image.new("RGB", (24, 12)).save(tmp_path / "here.png")
    sets = {
        "image": {"problem": "<image>read?", "answer": "5", "image": "gone.png"},
        "answer": {"problem": "<image>read?", "image": "here.png"},
        "thought": {"problem": "<image>read?", "answer": "<think>five</think>", "image": "here.png"},
    }
    for name, sample in sets.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "old.json").write_text("{}")
    usual = {"--model": model, "--data": data, "-o": tmp_path / "r.json"}
    changes = {name: {"--data": tmp_path / f"{name}.jsonl"} for name in (*sets, "empty", "absent")}
    changes |= {
        "adapter": {"--model": tmp_path / "adapter"}, "no adapter": {"--adapter": model},
        "no model": {"--model": tmp_path}, "old": {"-o": tmp_path / "old.json"},
        "no folder": {"-o": tmp_path / "no" / "r.json"}, "category": {"--category": "level"},
        "split": {"--split": "foo"},
    }  # fmt: skip
    return lambda name: [part for pair in (usual | changes[name]).items() for part in pair]


@pytest.mark.parametrize("name, sentence", [
    ("image", " names the image gone.png, which is not there"), ("answer", "has problem, image: name its turns"),
    ("thought", "sample 1 has no known answer: nothing is boxed, or said after its thinking"),
    ("empty", "empty.jsonl cannot be read: it is empty"), ("absent", "there is no data "),
    ("adapter", "adapter is an adapter, not a model: merge it (drift-peft merge --base BASE --adapter "),
    ("no adapter", "vlm is no adapter: it has no adapter_config.json"), ("no model", " cannot be loaded: "),
    ("old", "old.json exists, and has no journal to go on from: name another file"),
    ("no folder", "r.json cannot be written: name a file in a folder that exists"),
    ("category", "has the category level"), ("split", "test.jsonl has no splits, so split foo cannot be taken of it: "),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(name, sentence, broken, tmp_path, capsys):
    before = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert sentence in refusal(capsys, *broken(name))
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == before


def test_a_sample_that_the_processor_refuses_is_named_before_the_model_is_loaded(
    model, data, tmp_path, capsys, monkeypatch
):
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples:
        sample["image"] = str(data.parent / sample["image"])
    Image.new("RGB", (900, 2)).save(data.parent / "wide.png")
    samples.append({**samples[-1], "image": str(data.parent / "wide.png")})
    (tmp_path / "wide.jsonl").write_text("\n".join(map(json.dumps, samples)))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    flags = ["--images", data.parent, "-o", tmp_path / "r.json", "--processor-kwargs", '{"do_resize": true}']
    told = refusal(capsys, "--model", model, "--data", tmp_path / "wide.jsonl", *flags)
    assert f"sample 15 of {tmp_path / 'wide.jsonl'} with 900 x 2 pixels is refused by the model's processor: " in told
    assert "take it out (absolute aspect ratio must be smaller than 200" in told and not [*tmp_path.glob("r.*")]


def test_a_processor_that_takes_no_sample_is_told_and_no_sample_is_blamed(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    mute = shutil.copytree(model, tmp_path / "mute", ignore=shutil.ignore_patterns("chat_template*"))
    told = refusal(capsys, "--model", mute, "--data", data, "--images", data.parent, "-o", tmp_path / "r.json")
    assert (
        "the model's processor takes none of the 14 samples: " in told
        and "template" in told
        and "take it out" not in told
    )
