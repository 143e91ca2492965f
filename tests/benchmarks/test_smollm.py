"""benchmarks/smollm.py without a model: its world, its plan, and the tables of what is committed."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import smollm
import torch
from smollm_study import make
from smollm_study.precision import NF4, autocast, compute_dtype, nf4
from smollm_study.ways import KEPT, STARTED, SWEEPS, TRAINED, WAYS
from smollm_study.world import ASKED, PERCEPTION, Pictures, draw_many, exams, is_right, text_chain

from drift_peft import DriftConfig

RESULTS = Path(smollm.__file__).parent / "results"


def test_the_answers_are_right():
    rng, pictures = np.random.default_rng(0), Pictures("train")
    for sample in [text_chain(rng) for _ in range(50)] + [pictures.draw("solve", rng) for _ in range(50)]:
        *steps, last = sample.answer.removesuffix(".").split(". ")
        for step in steps:
            calculation, result = step.split("=")
            assert eval(calculation) == int(result)
        assert last == f"The answer is {result}"
        assert is_right(sample, f"So. The answer is {result}.") and not is_right(sample, "The answer is 12.")
        assert not is_right(sample, f"The answer is {result}") and not is_right(sample, "")


def test_a_story_and_its_orders_are_the_chain():
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        sample = text_chain(rng)
        numbers = re.findall(r"\d", sample.question)
        said = re.findall(r"[+-](\d)", sample.answer)
        assert numbers == [sample.answer[0], *said]
        seen.add(re.sub(r"\d", "", sample.question.split()[0]))
    assert {"Start", "Calculate"} < seen and seen & {"Anna", "Ben", "Carla", "David", "Emma"}


def test_every_question_fits_its_image():
    rng, pictures = np.random.default_rng(0), Pictures("test")
    for kind in (*PERCEPTION, "describe"):
        samples = [pictures.draw(kind, rng) for _ in range(30)]
        assert {s.image.size for s in samples} == {(48, 48)} and {s.kind for s in samples} == {kind}
        assert not any("{" in s.question + s.answer for s in samples)
        assert len({s.question for s in samples}) >= len(ASKED[kind])
        assert all(is_right(s, f" {s.answer}\n") and not is_right(s, s.answer + "x") for s in samples)
    described = {pictures.draw("describe", rng).answer.split()[1] for _ in range(60)}
    assert {"symbols", "chart", "word"} < described


def test_splits_share_no_handwriting():
    train, validation, test = map(Pictures, ("train", "validation", "test"))
    assert not {*train.digits.indices} & ({*test.digits.indices} | {*validation.digits.indices})
    assert not {*test.digits.indices} & {*validation.digits.indices}


def test_the_tower_is_taught_what_an_image_shows():
    rng, pictures = np.random.default_rng(0), Pictures("train")
    for kind in ("read", "bars", "word"):
        sample = pictures.draw(kind, rng)
        assert "".join(sample.shown).strip() == sample.answer
    described = [pictures.draw("describe", rng) for _ in range(40)]
    assert all("".join(sample.shown).strip() in sample.answer for sample in described)


@pytest.mark.parametrize(
    ("device", "processor", "dtype"),
    [("cpu", "AVX512", torch.bfloat16), ("cpu", "AVX2", torch.float32), ("cuda", "AVX2", torch.bfloat16)],
)
def test_in_which_numbers_is_computed(monkeypatch, device, processor, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    device = torch.device(device)
    assert compute_dtype(device) == nf4(device).bnb_4bit_compute_dtype == dtype
    assert NF4.bnb_4bit_compute_dtype == torch.bfloat16  # which the ledger knows, whatever the computer
    if device.type == "cpu":
        with autocast(device):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_exams_are_the_same_for_every_way():
    first, again, other = exams("test", 0, 3), exams("test", 0, 3), exams("test", 1, 3)
    assert first.keys() == {"2-3 operations", "4-5 operations", "text reasoning", *PERCEPTION}
    assert [s.answer for s in first["read"]] == [s.answer for s in again["read"]] != [s.answer for s in other["read"]]
    longest = max(
        s.answer.count("=") for s in draw_many(20, lambda rng: Pictures("test").draw("solve", rng, (4, 5)), (0,))
    )
    assert longest == 5 and {s.answer.count("=") for s in first["4-5 operations"]} <= {4, 5}


def test_ways_with_keeping_differ_in_that_alone():
    for key, way in KEPT.items():
        plain = TRAINED[key.removesuffix("-keep")]
        assert replace(way, title=plain.title, kept=False) == plain
    for key, way in STARTED.items():
        cold = KEPT[key.replace("drift-start", "drift")]
        assert replace(way, title=cold.title, drift=cold.drift) == cold
        share = KEPT[key.replace("drift-start", "merge-lora")].merged
        assert way.drift == cold.drift | {"drift_start": share} and share == 0.5
    assert {len(way.grid) for way in WAYS.values() if way.grid} == {3}


@pytest.mark.parametrize("way, change", [(way, change) for way, changes in SWEEPS.items() for change in changes])
def test_what_is_changed_afterwards_can_be_set(way, change):
    own = {name: value for name, value in change.items() if name not in {"rate", "scale"}}
    assert WAYS[way].drift is not None or not own
    DriftConfig(**({"prior": "prior.safetensors", "r": 16} | (WAYS[way].drift or {}) | own))


def test_a_report_makes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        smollm.main(["--report", "--folder", str(tmp_path / "smollm")])
    assert end.value.code == 2 and f"smollm{os.sep}smollm.jsonl is not there" in capsys.readouterr().err
    assert not (tmp_path / "smollm").exists()


@pytest.mark.parametrize(
    ("name", "way", "least"),
    [("smollm", "LoRA, keeping", 5), ("smollm_first", "LoRA, keeping", 5), ("smollm_third", "DRIFT that starts at", 3)],
)
def test_the_tables_of_a_committed_ledger_need_no_checkpoints(name, way, least, tmp_path, capsys):
    file = RESULTS / f"{name}.jsonl"
    smollm.main(["--report", "--folder", str(tmp_path), "--ledger", str(file)])
    printed = capsys.readouterr().out
    assert f"{tmp_path} lacks base, expert, vlm" in printed.replace("\n", " ") and "prior-ancestor" not in printed
    rows = [line.rstrip() for line in printed.splitlines() if line.startswith(f"│ {way}")]
    assert len(rows) >= least and {*rows[:2]} <= {*(RESULTS / "smollm.txt").read_text(encoding="utf-8").splitlines()}
    with pytest.raises(SystemExit):
        smollm.main(["--report", "--folder", str(tmp_path), "--ledger", str(file), "--four-bit", "1"])
    assert "--four-bit needs base, expert, vlm" in capsys.readouterr().err


def test_runs_of_checkpoints_that_are_not_here_are_refused_before_any_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "make_all", lambda *_: pytest.fail("made"))
    command = ["--folder", str(tmp_path), "--ledger", str(RESULTS / "smollm.jsonl"), "--device", "cpu"]
    with pytest.raises(ValueError, match=r"lacks \(base, vlm\): put them there, or give --ledger another file$"):
        smollm.main(command)
    for name in make.CHECKPOINTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"on other checkpoints than those in .*, or give --ledger another file$"):
        smollm.main(command)
