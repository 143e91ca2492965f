"""The embedded world is what it claims to be, and the demo runs from prior to merged model."""

import importlib.util
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import Mock

import command
import numpy as np
import pytest
import torch
import tune_demo
from hypothesis import given
from hypothesis import strategies as st
from older import loads_processors
from processes import CONTEXT, run_program
from transformers import AutoModelForImageTextToText, Qwen2ForCausalLM

from drift_peft import demo
from drift_peft.demo.compare import CHECKPOINTS, EXPERT, METHODS, VLM, learning_rates
from drift_peft.demo.evaluate import accuracy, ask, encode, exams, is_right
from drift_peft.demo.train import load, task_arithmetic
from drift_peft.demo.world import (
    CELL,
    PERCEPTION,
    SPLITS,
    Digits,
    Sample,
    expression,
    make_sample,
    make_samples,
    solution,
)


@pytest.fixture(scope="module")
def vlm():
    torch.set_num_threads(1)
    return load(VLM)


@given(st.integers(1, 5), st.integers(0, 2**32))
def test_answers_are_right(operations, seed):
    chain = expression(operations, np.random.default_rng(seed))
    steps, boxed = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d)\}", solution(chain)).groups()
    steps = steps.split(";")
    assert len(steps) == operations
    assert int(boxed) == eval(chain)
    for i, step in enumerate(steps, start=1):
        left, right = step.split("=")
        assert eval(left) == int(right) == eval(chain[: 2 * i + 1])
        assert 0 <= int(right) <= 9


@given(st.sampled_from(PERCEPTION), st.integers(0, 2**32))
def test_perception_answers_are_right(task, seed):
    sample = make_sample(task, np.random.default_rng(seed))
    if task == "read":
        assert sample.answer == sample.symbols
    elif task == "count":
        assert int(sample.answer) == len(sample.symbols)
    else:
        assert sample.symbols[int(sample.question[2:-1]) - 1] == sample.answer


def test_splits_never_share_a_digit():
    splits = {name: set(Digits(name).indices) for name in SPLITS}
    assert {name: len(indices) for name, indices in splits.items()} == SPLITS
    assert len(set.union(*splits.values())) == sum(SPLITS.values()) == 1797


def test_the_world_is_deterministic():
    digits = Digits("test")

    def draw(seed):
        samples = make_samples(5, [*PERCEPTION, "solve"], np.random.default_rng(seed), digits)
        return [(s.symbols, s.question, s.answer, s.image.tobytes()) for s in samples]

    assert draw(1) == draw(1) != draw(2)


def test_one_token_per_symbol(vlm):
    _, processor = vlm
    sample = make_sample("solve", np.random.default_rng(0), Digits("test"))
    assert sample.image.size == (CELL * len(sample.symbols), CELL)
    batch = encode(processor, [sample])
    assert (batch["input_ids"] == processor.image_token_id).sum() == len(sample.symbols)
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == sample.answer + "<|eos|>"


def test_reasoning_is_marked_by_the_box_and_perception_by_all():
    solve, read = Sample("solve", "1+1", "solve?", solution("1+1")), Sample("read", "1+1", "read?", "1+1")
    assert is_right(solve, r"so \boxed{2}") and not is_right(solve, r"\boxed{22}") and not is_right(solve, "2")
    assert is_right(read, "1+1") and not is_right(read, "1+1+")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--methods", "lora", "dora"], "unknown method 'dora': choose from vlm, "),
        (["--seed", "0", "-1"], "--seed -1: give 0 or more"),
        (["--seed", "1", "0", "0"], "--seed 0 is given twice, which tells nothing of the spread: give other seeds"),
        (["--out", __file__], f"output {__file__} is no folder: name another one (--out)"),
        (["--out", f"{__file__}/x"], f"output {__file__}/x cannot be made: "),
        (["--seeds", "3"], "unknown flag --seeds; did you mean --seed?"),
    ],
)
def test_the_command_refuses(flags, error, capsys):
    status, _, err = command.run(capsys, "demo", *flags)
    assert status and f"drift-peft: error: {error}" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_command_says_what_several_seeds_have_in_common(tmp_path, capsys, monkeypatch):
    run, asked = demo.compare.run, []

    def small(out, seed, methods, **settings):
        asked.append((seed, methods, settings["steps"], settings["executor"]))
        return run(out, seed, methods, size=2, **settings)

    monkeypatch.setattr("drift_peft.demo.compare.run", small)
    flags = ("--seed", 5, 6, "--steps", 1, "--methods", "vlm", "merge-0.5", "--processes", 1)
    status, out, _ = command.run(capsys, "demo", *flags, "--out", tmp_path)
    assert status == 0 and asked == [(seed, ["vlm", "merge-0.5"], 1, None) for seed in (5, 6)]
    assert "seed 5, 6" in out and out.count(" ± ") == 2 * 5
    assert [row["seed"] for row in json.loads((tmp_path / "study.json").read_text())] == [5, 6]
    assert (tmp_path / "seed6" / "results.json").exists()


@loads_processors
def test_the_checkpoints_need_nothing_but_transformers(tmp_path):
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
text, image = AutoModelForCausalLM, AutoModelForImageTextToText
for name, auto in ("base", text), ("reasoner", text), ("vlm", image):
    folder = {str(CHECKPOINTS)!r} + "/" + name
    model = auto.from_pretrained(folder)
    print(type(model).__name__, model.dtype, AutoTokenizer.from_pretrained(folder)("7-3?<think>").input_ids)
AutoProcessor.from_pretrained({str(VLM)!r})
assert "drift_peft" not in sys.modules
"""
    printed = run_program(tmp_path, "-c", code)
    text, multimodal = "Qwen2ForCausalLM torch.bfloat16", "Qwen2_5_VLForConditionalGeneration torch.bfloat16"
    lines = printed.splitlines()
    assert [line.partition(" [")[0] for line in lines] == [text, text, multimodal]
    assert len({line.partition(" [")[2] for line in lines}) == 1  # one token space


def test_the_checkpoints_are_small_and_share_embeddings_and_head(vlm):
    parts = {}
    for name in ("base", "reasoner"):
        assert (CHECKPOINTS / name / "model.safetensors").stat().st_size < 1.3e6
        model = Qwen2ForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
        parts[name] = model.get_input_embeddings().weight, model.lm_head.weight
    assert (VLM / "model.safetensors").stat().st_size < 1.7e6
    parts["vlm"] = vlm[0].get_input_embeddings().weight, vlm[0].lm_head.weight
    for name in ("reasoner", "vlm"):
        assert all(torch.equal(a, b) for a, b in zip(parts["base"], parts[name], strict=True))


def test_the_vlm_reads_held_out_digits_but_cannot_reason(vlm):
    model, processor = vlm
    tests = exams("test", seed=7, size=50)
    read = [sample for task in PERCEPTION for sample in tests[task]]
    assert accuracy(read, ask(model, processor, read)) >= 0.85
    assert accuracy(tests["2-3 operations"], ask(model, processor, tests["2-3 operations"])) <= 0.3


def test_the_reasoner_reasons_in_text(vlm):
    reasoner = Qwen2ForCausalLM.from_pretrained(EXPERT, dtype=torch.float32)
    samples = exams("test", seed=7, size=50)["text reasoning"]
    assert accuracy(samples, ask(reasoner, vlm[1], samples)) >= 0.9


def test_task_arithmetic_of_strength_one_is_the_reasoner(vlm, tmp_path):
    task_arithmetic(VLM, EXPERT, 1.0, tmp_path / "swapped")
    swapped, _ = load(tmp_path / "swapped")
    reasoner = Qwen2ForCausalLM.from_pretrained(EXPERT, dtype=torch.float32)
    theirs = reasoner.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in swapped.model.language_model.state_dict().items())


def test_the_demo_runs_from_prior_to_merged_model(tmp_path, capsys):
    methods = ["vlm", "merge-0.5", "lora", "drift", "decoupled"]
    result = demo.run(tmp_path / "demo", seed=3, methods=methods, steps=3, size=4)
    out = capsys.readouterr().out
    assert all(METHODS[key].title in out for key in methods)
    assert json.loads((tmp_path / "demo/results.json").read_text()) == result
    assert list(result["scores"]) == methods
    assert set(result["history"]) == {"lora", "drift", "decoupled"}
    assert result["history"]["drift"][0]["alignment"] > 0.2 > abs(result["history"]["lora"][0]["alignment"])
    for file in ("prior.safetensors", "results.png", "samples.png", "drift/adapter/drift_config.json"):
        assert (tmp_path / "demo" / file).stat().st_size > 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "demo/drift/merged").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(VLM).state_dict()
    moved = [name for name, tensor in base.items() if not torch.equal(tensor, merged[name])]
    assert moved and all(re.search(r"language_model\.layers\.\d\..*_proj\.weight", name) for name in moved)


@pytest.mark.slow
def test_other_processes_change_nothing_but_the_time():
    given = {"seed": 4, "methods": ["vlm", "drift-keep"], "steps": 2, "size": 2, "show": False}
    here = demo.run(**given)
    with ProcessPoolExecutor(2, CONTEXT) as executor:
        there = demo.run(**given, executor=executor)
    assert here.pop("seconds") and there.pop("seconds")
    assert here == there and list(here["scores"]) == list(there["scores"]) == given["methods"]


THEIRS = ["prior.safetensors", "keep.safetensors", "results.json", "results.png", "samples.png", "drift", "merge-0.5"]


@pytest.mark.parametrize("name", THEIRS)
def test_what_no_demo_has_written_is_not_replaced(name, tmp_path):
    (tmp_path / name).write_text('{"seed": 0, "steps": 150, "accuracy": 0.5}')
    with pytest.raises(FileExistsError, match=f"holds {name} and is no folder of an earlier demo, so nothing in it is"):
        demo.run(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / name).rename(tmp_path / "study" / "study.json")
    with pytest.raises(ValueError, match=r"^output is empty: name a folder \(--out\)$"):
        demo.compare.check_folder("")
    with pytest.raises(FileExistsError, match=r"holds study.json and is no folder of an earlier demo"):
        demo.study([0, 1], tmp_path / "study")
    (tmp_path / "study" / "seed1").mkdir()
    (tmp_path / "study" / "study.json").rename(tmp_path / "study" / "seed1" / name)
    with pytest.raises(FileExistsError, match=f"seed1 holds {name} and is no folder"):
        demo.study([0, 1], tmp_path / "study")
    assert {path.name for path in tmp_path.rglob("*")} == {"study", "seed1", name}


def test_what_a_demo_has_written_is_replaced(tmp_path, monkeypatch, capsys):
    """Of a run, interrupted or finished, and of a study."""
    quick = {"methods": ["vlm"], "size": 2}

    def interrupted(run, *given):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("drift_peft.demo.compare.exams", Mock(side_effect=KeyboardInterrupt))
            run(*given, **quick)

    (tmp_path / "notes.txt").write_text("mine")
    interrupted(demo.run, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "prior.safetensors", "results.json"]
    (tmp_path / "drift" / "adapter").mkdir(parents=True)  # of that run's, which the next one does not ask for
    result = demo.run(tmp_path, **quick)
    pictures = "results.png", "samples.png"
    assert sorted(os.listdir(tmp_path)) == sorted(["notes.txt", "prior.safetensors", "results.json", *pictures])
    told = f"{tmp_path} holds prior.safetensors, results.png, samples.png, results.json."
    assert told in capsys.readouterr().out.replace("\n", "")
    assert json.loads((tmp_path / "results.json").read_text()) == result
    interrupted(demo.run, tmp_path)
    (tmp_path / "study.json").write_text(json.dumps([result]))
    interrupted(demo.study, [0], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_rate_is_named_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="rates name no learning rate of 'drift', which trains"):
        demo.run(tmp_path / "demo", methods=["vlm", "lora", "drift"], rates={"lora": 1e-3})
    assert not (tmp_path / "demo").exists()


def test_tuning_refuses_what_does_not_train(capsys):
    with pytest.raises(SystemExit) as end:
        tune_demo.main(["vlm"])
    assert end.value.code == 2 and "nothing to tune for vlm: name some of lora" in capsys.readouterr().err


def test_every_method_that_trains_was_tuned_on_the_same_grid():
    tuning = json.loads((CHECKPOINTS.parent / "tuning.json").read_text())
    assert set(tuning["validation"]) == {key for key, method in METHODS.items() if method.trained}
    assert len({tuple(grid) for grid in tuning["validation"].values()}) == 1
    assert set(learning_rates()) == set(tuning["validation"])


def test_a_missing_extra_is_named_before_any_work(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(ImportError, match=r'the demo needs scikit-learn: pip install "drift_peft\[demo\]"'):
        demo.run(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'dritf': choose from vlm, "):
        demo.run(methods=["dritf"])
