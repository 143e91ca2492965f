"""recipes/score.py: outputs as both tools write them, scored by rule, with intervals known by hand."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import score
import yaml
from parts import answers
from parts.outputs import BENCHMARKS, read_outputs
from parts.reading import read_answer
from parts.scoring import mark, scorer

RECIPES = Path(__file__).parents[2] / "recipes"

RIGHT = r"<think>Say {0}.</think> The answer is \boxed{{{0}}}."
WRONG, CUT = RIGHT.format(-77), r"<think>It could be \boxed{7}, but wait"
STEPS = [  # problem, its steps one by one, the whole; by hand, strict 1 + 0 + 0 + 0.5 + 0, loose 1 + 1 + 0 + 0.5 + 0
    ("1", [1, 1], 1), ("2", [1, 0], 1), ("3", [0, 0], 1), ("4", [1, 1], 0), ("1", [1, 0, 1], 0),
]  # fmt: skip


def reply(gold, right):
    return CUT if right is None else RIGHT.format(gold) if right else WRONG


def vlmevalkit(folder, dataset, rights, name="m", form="tsv", **columns):
    """A file as vlmeval/smp/file.py dumps it: right, wrong or (None) cut answers to questions of known sums."""
    golds = [str(i + 1) for i in range(len(rights))]
    table = pd.DataFrame({"index": range(len(rights)), "question": [f"What is {i} + 1?" for i in range(len(rights))]})
    table["answer"] = golds
    for column, values in columns.items():
        table[column] = values
    table["prediction"] = [reply(gold, right) for gold, right in zip(table["answer"], rights, strict=True)]
    file = folder / "T20261122-093000" / f"{name}_{dataset}.{form}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "tsv":
        table.to_csv(file, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)
    elif form == "json":
        file.write_text(json.dumps(table.to_dict("records"), indent=4, ensure_ascii=False))
    else:
        file.write_bytes(b"not empty")
    return file


def lmms_eval(folder, task, rights, **fields):
    """A file as lmms_eval/loggers/evaluation_tracker.py writes it: the thinking is taken out of filtered_resps."""
    lines = []
    for i, right in enumerate(rights):
        response = reply(str(i + 1), right)
        stripped = response.rpartition("</think>")[2].strip()
        line = {"doc_id": i, "target": str(i + 1), "filtered_resps": stripped}
        line |= {"resps": response} if stripped != response else {}
        line |= {"token_counts": [{"output_tokens": 9}], "doc_hash": f"{i:064}", "acc_score": 0.0, "format_score": 1.0}
        line |= {key: values[i] for key, values in fields.items()}
        lines.append(json.dumps(line | {"input": f"What is {i} + 1?"}, ensure_ascii=False))
    file = folder / "runs__drift" / f"20261122_093000_samples_{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


WRITERS = {"VLMEvalKit": (vlmevalkit, 0), "lmms-eval": (lmms_eval, 1)}


def wemath():
    """ID, key and whether it is right, of each sample of STEPS."""
    for problem, steps, whole in STEPS:
        for i, right in enumerate(steps, 1):
            yield problem, f"{len(steps)}steps_{i}", right
        yield problem, f"{len(steps)}steps_multi", whole


def save(tool, folder, benchmark, rights):
    write, which = WRITERS[tool]
    name = BENCHMARKS[benchmark][which] if which == 0 else BENCHMARKS[benchmark][which][0]
    if benchmark == "WeMath":
        ids, keys, _ = zip(*wemath(), strict=True)
        problems = [{"ID": problem, "key": key, "question": "q"} for problem, key in zip(ids, keys, strict=True)]
        columns = {"ID": ids, "key": keys} if which == 0 else {"wemath_strict": problems, "wemath_loose": problems}
        return write(folder, name, rights, **columns)
    return write(folder, name, rights)


def run(tmp_path, capsys, *flags, sft=True):
    """The numbers that main() prints."""
    names = ("base", "sft", "drift") if sft else ("base", "drift")
    score.main([*(part for name in names for part in (f"--{name}", str(tmp_path / name))), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        score.main([*map(str, arguments)])
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and error[-1].startswith("score.py: error: ")
    return error[-1]


@pytest.mark.parametrize("tool", WRITERS)
def test_scores_and_intervals_are_those_computed_by_hand(tool, tmp_path, capsys):
    for name, rights in {"base": [1, 0, 0, 1], "sft": [1, 0, None, 1], "drift": [1, 1, 0, 1]}.items():
        save(tool, tmp_path / name, "MathVista", rights)
    result = run(tmp_path, capsys)
    column = result["columns"]["MathVista"]
    assert column["scores"] == {"base": 50.0, "SFT": 50.0, "DRIFT": 75.0}
    assert (column["samples"], column["unfinished"]) == (4, {"base": 0, "SFT": 1, "DRIFT": 0})
    # One of four differs, so its count in a resample is binomial(4, 1/4): P(0) = .32, P(<= 2) = .949, P(<= 3) = .996.
    assert column["differences"]["DRIFT - base"] == {"difference": 25.0, "interval": [0.0, 75.0]}
    assert result["published"]["DRIFT"] == {"MathVista": 69.9} and result["scorer"] == scorer()
    assert result["bootstrap"] == {"resamples": 10_000, "seed": 0, "level": 0.95}


def test_the_interval_is_that_of_the_normal_distribution_where_samples_are_many():
    generator = np.random.default_rng(1)
    differences = generator.choice([-1.0, 0.0, 1.0], size=(2000, 1), p=[0.1, 0.7, 0.2])
    low, high = np.quantile(score.resample(differences, 0), [0.025, 0.975])
    half = 1.96 * differences.std() / np.sqrt(len(differences))
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.001)


def test_pairing_makes_the_interval_of_equal_models_a_point(tmp_path, capsys):
    for name in ("base", "drift"):
        save("VLMEvalKit", tmp_path / name, "LogicVista", [1, 0] * 20)
    column = run(tmp_path, capsys, sft=False)["columns"]["LogicVista"]
    assert column["differences"] == {"DRIFT - base": {"difference": 0.0, "interval": [0.0, 0.0]}}


@pytest.mark.parametrize("tool", WRITERS)
def test_wemath_is_scored_by_whole_problems(tool, tmp_path, capsys):
    for name in ("base", "drift"):
        save(tool, tmp_path / name, "WeMath", [bool(right) for *_, right in wemath()])
    columns = run(tmp_path, capsys, sft=False)["columns"]
    assert {name: column["scores"]["base"] for name, column in columns.items()} == {
        "WeMath strict": 30.0,
        "WeMath loose": 50.0,
    }
    assert columns["WeMath strict"]["samples"] == 16 and columns["WeMath strict"]["units"] == 5


@pytest.mark.parametrize("tool", WRITERS)
def test_the_tables_have_the_layout_of_the_paper_with_its_numbers(tool, tmp_path, capsys):
    wide = {"base": [1, 0, 0, 1], "sft": [1, 0, 0, 1], "drift": [1, 1, 0, 1]}
    for name, rights in wide.items():
        for benchmark in list(BENCHMARKS)[:5]:
            steps = [bool(right) for *_, right in wemath()]
            save(tool, tmp_path / name, benchmark, steps if benchmark == "WeMath" else rights)
    places = [part for name in wide for part in (f"--{name}", str(tmp_path / name))]
    score.main([*places, "-o", str(tmp_path / "scores.json")])
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    # The averages are those of table 2, which the file of published numbers does not hold.
    assert rows["base, published"] == ["67.9", "25.0", "41.4", "34.3", "52.8", "46.7", "44.7"]
    assert rows["DRIFT, published"] == ["69.9", "26.6", "43.9", "38.5", "60.2", "47.2", "47.7"]
    assert rows["SFT, published"][:6] == ["68.7", "25.1", "42.0", "33.3", "55.8", "45.6"]
    assert rows["DRIFT"] == ["75.0", "75.0", "75.0", "30.0", "50.0", "75.0", "63.3"]
    assert rows["Avg."][2].startswith("+16.7 [") and rows["MathVista"][:3] == ["4", "0 / 0 / 0", "+25.0 [+0.0, +75.0]"]
    columns = json.loads((tmp_path / "scores.json").read_text())["columns"]
    narrow, wider = (np.ptp(columns[name]["differences"]["DRIFT - base"]["interval"]) for name in ("Avg.", "MathVista"))
    assert narrow < wider / 2  # six columns together, of which WeMath's two do not differ


@pytest.mark.parametrize("form", ["tsv", "json"])
def test_vlmevalkit_options_and_thinking_come_from_their_columns(form, tmp_path):
    columns = {"answer": ["12 cm", "B"], "answer_option": ["B", ""], "question_type": ["multi_choice", "free_form"]}
    columns |= {
        "choices": ["['10 cm', '12 cm']", "[]"],
        "A": [None, "red"],
        "B": [None, "blue"],
        "thinking": ["so", ""],
    }
    vlmevalkit(tmp_path, "MathVista_MINI", [1, 1], form=form, **columns)
    first, second = read_outputs(tmp_path)["MathVista"]
    assert (first.id, first.gold, first.question) == ("0", "B", "What is 0 + 1?\nA. 10 cm\nB. 12 cm")
    assert (
        first.response.startswith("<think>so</think><think>Say 12 cm.") and mark(first.response, "B", first.question)[0]
    )
    assert (second.gold, second.question) == ("B", "What is 1 + 1?\nA. red\nB. blue")
    assert second.response == RIGHT.format("B")


def test_a_result_of_evaluate_is_read_too(tmp_path, capsys):
    for name, rights in {"base": [1, 0], "drift": [1, 1]}.items():
        samples = [{"index": i, "question": "?", "gold": str(i)} for i in range(2)]
        samples = [{**sample, "response": reply(sample["gold"], rights[i])} for i, sample in enumerate(samples)]
        content = {"data": "sets/own.jsonl", "scorer": {}, "samples": samples}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    score.main(["--base", str(tmp_path / "base.json"), "--drift", str(tmp_path / "drift.json"), "--json"])
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert {name: column["scores"] for name, column in columns.items()} == {"own": {"base": 50.0, "DRIFT": 100.0}}


def test_results_about_two_data_sets_are_named_with_these(tmp_path, capsys):
    sample = {"index": 0, "question": "q", "gold": "4", "response": "4"}
    for name, data in (("base", "digits/test.jsonl"), ("drift", "digits/few.jsonl")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": data, "scorer": {}, "samples": [sample]}))
    base, drift = tmp_path / "base.json", tmp_path / "drift.json"
    told = f"{base} was asked about digits/test.jsonl, and {drift} about digits/few.jsonl: run the same tool with the"
    assert told in refusal(capsys, "--base", base, "--drift", drift)
    save("VLMEvalKit", tmp_path / "drift", "MMStar", [1])  # which says no more than the benchmark
    told = "there is MMStar of DRIFT, and none of base: run the same tool"
    assert told in refusal(capsys, "--base", base, "--drift", tmp_path / "drift")


@pytest.mark.parametrize("key, one, two", [
    ("data_sha256", "12", "ab"), ("prompt", "", "In one word."), ("max_new_tokens", 24, 6),
    ("processor_kwargs", None, {"max_pixels": 9}),
])  # fmt: skip
def test_results_that_were_asked_otherwise_are_not_compared_in_silence(key, one, two, tmp_path, capsys):
    alike = {"data_sha256": "12", "prompt": "", "max_new_tokens": 24, "processor_kwargs": None}
    samples = [{"index": i, "question": f"q{i}", "gold": "4", "response": "4"} for i in range(2)]
    for name, value in (("base", one), ("sft", one), ("drift", two)):
        content = {"data": "own.jsonl", "scorer": {}, **alike, key: value, "samples": samples}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    base, sft, drift = (tmp_path / f"{name}.json" for name in ("base", "sft", "drift"))
    flags = ["--base", str(base), "--sft", str(sft), "--drift", str(drift)]
    told = f"{base} was asked with {key} {json.dumps(one)}, {drift} with {json.dumps(two)}"
    error = f"score.py: error: {told}: ask all alike, or pass --force to compare them nevertheless"
    assert refusal(capsys, *flags) == error
    score.main([*flags, "--force", "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["asked_otherwise"] == [told] and shown.err.splitlines()[-1] == f"note: {told}"
    flags[-1] = str(sft)
    score.main([*flags, "--json"])
    assert "asked_otherwise" not in json.loads(capsys.readouterr().out)


def test_no_settings_of_the_processor_are_none_however_they_are_written(tmp_path, capsys):
    places = []
    for name, content in (("base", {"processor_kwargs": None}), ("sft", {}), ("drift", {"processor_kwargs": {}})):
        samples = [{"index": i, "question": f"q{i}", "gold": "4", "response": "4"} for i in range(2)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": "d", "scorer": {}, **content, "samples": samples}))
        places += [f"--{name}", str(tmp_path / f"{name}.json")]
    score.main([*places, "--json"])
    assert "asked_otherwise" not in json.loads(capsys.readouterr().out)


def test_where_long_texts_differ_is_shown(tmp_path, capsys):
    """Be it at their first characters, far behind, or where one of them has more."""
    rest = "Think about it, and write the answer behind all of your thoughts, please. " * 2
    pairs = [("One" + rest, "Two" + rest), (f"{rest}in a box", f"{rest}in a word"), (rest, f"{rest}Now.")]
    pairs += [("a" * each, "a" * each + "b") for each in (59, 60, 61)]
    for one, two in pairs:
        shown = score.where_they_part(one, two)
        assert shown[0] != shown[1] and max(map(len, shown)) <= 61
        places = []
        for name, prompt in (("base", one), ("drift", two)):
            samples = [{"index": 0, "question": prompt, "gold": "4", "response": "4"}]
            for file, content in ((name, {"samples": samples}), (f"{name}_asked", {"prompt": prompt})):
                content = {"samples": [{**samples[0], "question": "q"}], **content}
                (tmp_path / f"{file}.json").write_text(json.dumps({"data": "d", "scorer": {}, **content}))
            places += [f"--{name}", str(tmp_path / f"{name}.json")]
        told = f"sample 0 has another question: {shown[0]!r} in base, {shown[1]!r} in DRIFT"
        assert told in refusal(capsys, *places)
        told = refusal(capsys, *(place.replace(".json", "_asked.json") for place in places))
        one, two = re.fullmatch(r".*asked with prompt (.*), .*_asked.json with (.*): ask all alike.*", told).groups()
        assert one != two
    assert score.where_they_part(*pairs[1])[0].endswith("please. in a box")


def test_unfinished_answers_are_told(tmp_path, capsys):
    for name, rights in {"base": [1] * 10, "drift": [1] * 7 + [None] * 3}.items():
        save("VLMEvalKit", tmp_path / name, "HallusionBench", rights)
    score.main(["--base", str(tmp_path / "base"), "--drift", str(tmp_path / "drift")])
    metric, cut = capsys.readouterr().err.splitlines()[-2:]
    assert metric.startswith("note: HallusionBench: the paper does not say which")
    assert cut == (
        "note: answers without an end count as wrong, in HallusionBench (3 of 10 of DRIFT): allow more new tokens"
    )


def test_how_the_answers_of_each_model_were_read_is_told(tmp_path, capsys):
    forms = {"base": ["1", "The answer is **1**.", "<answer>1</answer>", "It may be"], "drift": [r"\boxed{1}"] * 4}
    forms["base"][3] += " 1, or 2, or any other of the numbers that were not asked for, since the"
    for name, responses in forms.items():
        samples = [{"index": i, "question": "?", "gold": "#### 1", "response": r} for i, r in enumerate(responses)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": "own.jsonl", "scorer": {}, "samples": samples}))
    score.main(
        ["--base", str(tmp_path / "base.json"), "--drift", str(tmp_path / "drift.json"), "-o", str(tmp_path / "s")]
    )
    column = json.loads((tmp_path / "s").read_text())["columns"]["own"]
    assert column["scores"] == {"base": 75.0, "DRIFT": 100.0} and column["unfinished"] == {"base": 1, "DRIFT": 0}
    none = {"unfinished": 0, "undecided": 0}
    assert column["read_by"]["base"] == {"boxed": 0, "tag": 1, "sentence": 1, "last line": 1} | none | {"unfinished": 1}
    assert column["read_by"]["DRIFT"] == {"boxed": 4, "tag": 0, "sentence": 0, "last line": 0} | none
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "own, base" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [["own, base", "0", "1", "1", "1", "1", "0"]]


@pytest.mark.slow
def test_answers_whose_comparison_takes_too_long_are_counted(tmp_path, monkeypatch, capsys):
    samples = [{"index": 0, "question": "?", "gold": "10^{10^{10}}", "response": r"\boxed{1}"}]
    (tmp_path / "own.json").write_text(json.dumps({"data": "own.jsonl", "scorer": {}, "samples": samples}))
    monkeypatch.setattr(answers, "SECONDS", 0.1)
    score.main(["--base", str(tmp_path / "own.json"), "--drift", str(tmp_path / "own.json"), "-o", str(tmp_path / "s")])
    column = json.loads((tmp_path / "s").read_text())["columns"]["own"]
    assert column["scores"] == {"base": 0.0, "DRIFT": 0.0} and column["unfinished"] == {"base": 0, "DRIFT": 0}
    assert column["read_by"]["base"]["undecided"] == column["read_by"]["DRIFT"]["undecided"] == 1
    assert "undecided" in capsys.readouterr().out


OTHER = {"inputs": {"base": "base", "DRIFT": "other"}, "columns": {}}


@pytest.mark.parametrize(
    "there", [b'{"question": "q"}\n{"question": "r"}\n', b"[1]", b"", b"\x89PNG", json.dumps(OTHER).encode()]
)
def test_no_file_is_written_over_but_scores_of_the_same_answers(there, tmp_path, capsys, monkeypatch):
    """So that the same command may be run again, with answers that have come meanwhile."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sft", "drift"):
        save("VLMEvalKit", tmp_path / name, "MathVista", [1, 0])
    (output := tmp_path / "scores.json").write_bytes(there)
    flags = ["--base", "base", "--drift", "drift", "-o", output]
    with monkeypatch.context() as patch:
        patch.setattr(score, "read_outputs", lambda place: pytest.fail("read"))
        held = "holds the scores of other answers" if b"inputs" in there else "exists, and holds no scores"
        assert refusal(capsys, *flags).count(f"output {output} {held}") and output.read_bytes() == there
        assert f"output {tmp_path} is a folder: name a file" in refusal(capsys, *flags[:-1], tmp_path)
        assert "there is no folder" in refusal(capsys, *flags[:-1], tmp_path / "no" / "scores.json")
    output.unlink()
    score.main([*map(str, flags)])
    assert json.loads(output.read_text())["columns"]["MathVista"]["scores"] == {"base": 50.0, "DRIFT": 50.0}
    save("VLMEvalKit", tmp_path / "drift", "MathVista", [1, 1])
    score.main([*map(str, flags)])
    assert json.loads(output.read_text())["columns"]["MathVista"]["scores"] == {"base": 50.0, "DRIFT": 100.0}
    assert "holds the scores of other answers (base base, DRIFT drift)" in refusal(capsys, *flags, "--sft", "sft")
    (tmp_path / "moved").mkdir()
    moved = output.rename(tmp_path / "moved" / "scores.json")
    score.main(["--base", "base", "--drift", str(tmp_path / "drift"), "-o", str(moved)])


@pytest.mark.parametrize("response, answer", [
    (r"<think>a \boxed{1}</think> b \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"so it is </think> \boxed{2}", "2"), (r"<think>a</think><answer> B </answer>", "B"),
    (r"<think>a</think> The answer is (B) 12 cm.", "(B) 12 cm."), ("Long.\n\n**Answer:** 42", "42"),
    ("**Final Answer**: 42\n", "42"), ("So far. The correct option is C\nas I said.", "C"), ("B", "B"),
    ("Yes.", "Yes."), (r"<think>a \boxed{3}</think>", "3"), (r"<think>a \boxed{3}", None), ("", None),
    ("<think>a</think>", None), ("<think>a</think> 5 <think>b", None),
    ("I will answer this now.\nFirst, look at the angle of the", None), (r"so \boxed{12", None),
])  # fmt: skip
def test_the_final_answer_is_found_by_rule(response, answer):
    assert (read_answer(response) or [None])[0] == answer


def two(tmp_path, first=(1, 0, 1), second=(1, 0, 1), benchmark="MathVista"):
    return [
        save("VLMEvalKit", tmp_path / name, benchmark, rights) for name, rights in (("base", first), ("drift", second))
    ]


def missing(tmp_path):
    two(tmp_path, second=(1, 0))


def more(tmp_path):
    two(tmp_path, first=(1, 0))


def changed(tmp_path):
    _, file = two(tmp_path)
    file.write_text(file.read_text().replace("What is 1 + 1?", "What is 1 plus 1?"))


def gold(tmp_path):
    for name, answer in (("base", "2"), ("drift", "3")):
        vlmevalkit(tmp_path / name, "MathVista_MINI", [1, 0], answer=["1", answer])


def twice(tmp_path):
    file, _ = two(tmp_path)
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")


def empty(tmp_path):
    _, file = two(tmp_path)
    file.write_text(file.read_text().splitlines()[0] + "\n")


def failed(tmp_path):
    file, _ = two(tmp_path)
    file.write_text(file.read_text().replace(WRONG, "Failed to obtain answer via API."))


def other_benchmark(tmp_path):
    two(tmp_path)
    save("VLMEvalKit", tmp_path / "base", "MMStar", [1])


def two_runs(tmp_path):
    two(tmp_path)
    vlmevalkit(tmp_path / "base" / "again", "MathVista_MINI", [1])


def pickled(tmp_path):
    two(tmp_path)[0].unlink()
    vlmevalkit(tmp_path / "base", "MathVista_MINI", [1], form="pkl")


def nothing_known(tmp_path):
    two(tmp_path)[0].rename(tmp_path / "base" / "m_SEEDBench.tsv")


def without_column(tmp_path):
    file, _ = two(tmp_path)
    file.write_text(file.read_text().replace('"prediction"', '"response_of_model"'))


def torn(tmp_path):
    for name in ("base", "drift"):
        file = save("lmms-eval", tmp_path / name, "MathVista", [1, 0])
    file.write_text(file.read_text()[:-9])


def torn_json(tmp_path, content="{"):
    two(tmp_path)[0].unlink()
    vlmevalkit(tmp_path / "base", "MathVista_MINI", [1], form="json").write_text(content)


def no_samples(tmp_path):
    torn_json(tmp_path, "{}")


def no_rows(tmp_path):
    torn_json(tmp_path, "[5]")


def no_text(tmp_path):
    lmms_eval(tmp_path / "base", "mmstar_reasoning", [1], target=[5])


def torn_choices(tmp_path):
    two(tmp_path)
    vlmevalkit(tmp_path / "base", "MathVista_MINI", [1], choices=["[1,"])


def no_table(tmp_path):
    two(tmp_path)[0].write_bytes(b"\xff\xfe\xfd")


def repeated(tmp_path):
    for name in ("base", "drift"):
        lmms_eval(tmp_path / name, "mmstar", [1], resps=[["a", "b"]])


def incomplete(tmp_path):
    for name in ("base", "drift"):
        vlmevalkit(tmp_path / name, "WeMath", [1, 1], ID=["7", "7"], key=["2steps_1", "2steps_multi"])


def not_there(tmp_path):
    save("VLMEvalKit", tmp_path / "base", "MMStar", [1])


@pytest.mark.parametrize("make, sentence", [
    (missing, "MathVista: sample 2 of base is not in DRIFT: run the same tool"),
    (more, "MathVista: sample 2 of DRIFT is not in base: run the same tool"),
    (changed, "sample 1 has another question: 'What is 1 + 1?' in base, 'What is 1 plus 1?' in DRIFT"),
    (gold, "sample 1 has another gold: '2' in base, '3' in DRIFT"),
    (twice, "m_MathVista_MINI.tsv: it holds sample 0 twice"),
    (empty, "m_MathVista_MINI.tsv: it is empty"),
    (failed, "m_MathVista_MINI.tsv: it holds 1 failures in place of answers: run VLMEvalKit again with --reuse"),
    (other_benchmark, "there is MMStar of base, and none of DRIFT"),
    (two_runs, "are both of MathVista: name the folder of one run"),
    (pickled, "m_MathVista_MINI.pkl: it is a pickle, which VLMEvalKit leaves when it is interrupted"),
    (nothing_known, "base holds no answers to a known benchmark: neither <model>_<data set>.tsv of VLMEvalKit"),
    (without_column, "m_MathVista_MINI.tsv: sample 0 lacks 'prediction'"),
    (torn, "samples_mathvista_testmini_cot_reasoning.jsonl: line 2 is no valid JSON"),
    (torn_json, "m_MathVista_MINI.json: it is no valid JSON: "),
    (no_samples, "m_MathVista_MINI.json: it holds no answers: name a result of evaluate.py"),
    (no_rows, "m_MathVista_MINI.json: it holds no answers: name a result of evaluate.py"),
    (no_text, "samples_mmstar_reasoning.jsonl: sample 0 has a gold that is no text: 5"),
    (torn_choices, "m_MathVista_MINI.tsv: sample 0 has choices that are no list: [1,"),
    (no_table, "m_MathVista_MINI.tsv: 'utf-8' codec can't decode byte"),
    (repeated, "sample 0 has 2 answers: run lmms-eval with --repeats 1"),
    (incomplete, "WeMath: problem 7 of 2steps lacks one of its steps: run all of the benchmark"),
    (not_there, "there is no "),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_sentence(make, sentence, tmp_path, capsys):
    make(tmp_path)
    output = tmp_path / "scores.json"
    assert sentence in refusal(capsys, "--base", tmp_path / "base", "--drift", tmp_path / "drift", "-o", output)
    assert not output.exists()


@pytest.mark.parametrize("content, sentence", [
    ('{"data": "d", "scor', "own.json: it is no valid JSON: "), ("5", "own.json: it holds no answers: name a result"),
    ('{"data": "d", "scorer": {}, "samples": 5}', "own.json: it holds no answers: name a result of evaluate.py"),
    ('{"data": "d", "scorer": {}, "samples": [{"index": 3, "response": "12", "gold": "12"}]}',
     "own.json: sample 3 lacks 'question'"),
])  # fmt: skip
def test_a_file_of_ones_own_that_cannot_be_used_is_named(content, sentence, tmp_path, capsys):
    (tmp_path / "own.json").write_text(content)
    assert sentence in refusal(capsys, "--base", tmp_path / "own.json", "--drift", tmp_path / "own.json")


def test_a_step_of_wemath_that_says_no_problem_is_named(tmp_path, capsys):
    lmms_eval(tmp_path / "base", "wemath_testmini_reasoning", [1], wemath_strict=["torn"])
    assert "sample 0 has a wemath_strict that is no object: torn" in refusal(
        capsys, "--base", tmp_path / "base", "--drift", tmp_path / "base"
    )


def test_excel_needs_a_library_and_its_cut_cells_are_refused(tmp_path, capsys, monkeypatch):
    save("VLMEvalKit", tmp_path / "drift", "MMStar", [1])
    vlmevalkit(tmp_path / "base", "MMStar", [1], form="xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    places = ("--base", tmp_path / "base", "--drift", tmp_path / "drift")
    assert (
        "m_MMStar.xlsx: reading it takes openpyxl: pip install openpyxl; or run VLMEvalKit with PRED_FORMAT=tsv"
        in refusal(capsys, *places)
    )
    monkeypatch.undo()
    row = {"index": "0", "question": "?", "answer": "1", "prediction": "a" * 32767}
    monkeypatch.setattr(pd, "read_excel", lambda *_, **__: pd.DataFrame([row]))
    assert "m_MMStar.xlsx: it holds 1 answers that Excel's format has cut" in refusal(capsys, *places)


def test_the_configurations_name_what_is_scored_and_treat_all_models_alike():
    for file in ("vlmevalkit_qwen2_5_vl.json", "vlmevalkit_qwen3_vl.json"):
        config = json.loads((RECIPES / "eval" / file).read_text())
        assert list(config["data"]) == [dataset for dataset, _ in list(BENCHMARKS.values())[:8]]
        assert all(setting["dataset"] == name for name, setting in config["data"].items())
        assert list(config["model"]) == ["base", "sft", "drift"]
        settings = [{**model, "model_path": None} for model in config["model"].values()]
        assert settings[0] == settings[1] == settings[2] and settings[0]["max_new_tokens"] >= 16384
        assert not settings[0]["use_custom_prompt"]
    known = {task for _, tasks in BENCHMARKS.values() for task in tasks}
    tasks = set(yaml.safe_load((RECIPES / "eval" / "lmms_eval.yaml").read_text())["tasks"].split(","))
    own = {file.stem for file in (RECIPES / "eval" / "lmms_eval_tasks").iterdir()}
    assert own < tasks < known and len(tasks) == 7
