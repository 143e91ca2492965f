"""The ways to train: SFT, DRIFT, either on a base that has taken a part of Δ in; and what a run says of itself."""

import json
import re
import shutil
import sys
from collections import namedtuple

import psutil
import pytest
import sft_vlm
import torch
from peft import PeftModel
from recipe_runs import FAST
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from drift_peft import ReasoningPrior
from drift_peft.merge import verify
from drift_peft.tuner.steered import steered_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def record(output):
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_sft_needs_no_prior_and_says_so(train, tmp_path):
    """It is plain LoRA from its usual start."""
    trainer, output = train(**FAST, method="sft", prior=None, expert=None)
    assert record(output)["settings"]["method"] == "sft" and record(output)["prior"] is None
    assert record(output)["settings"]["prior"] is None and record(output)["settings"]["drift_alpha"] == 0
    assert record(output)["results"]["guided_steps"] == 0
    assert len([key for key, weight in weights(output).items() if ".lora_B" in key and weight.any()]) == 14
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "Trained by plain LoRA fine-tuning, without a prior." in card and "guided" not in card
    assert not any(s.alpha for s in steered_of(trainer.model))
    with pytest.raises(SystemExit, match=r"method drift needs a prior: .* set method to sft"):
        train(**FAST, prior=None, output_dir=tmp_path / "none")


def test_drift_goes_on_from_a_base_that_has_half_of_delta(train, pair, tmp_path, capsys):
    """Made once, in full precision; steered toward the other half; merged into that base."""
    output, base = tmp_path / "run", tmp_path / "run-base"
    trainer, _ = train(**FAST, merge_first=0.5, merge=True)
    prior = ReasoningPrior.load(pair("qwen2_5_vl") / "prior.safetensors")
    for s in steered_of(trainer.model):
        assert torch.allclose(s.prior["S"], 0.5 * prior[s.name].S[:4])
    run = record(output)
    assert run["merged_first"]["scale"] == 0.5 and run["results"]["guided_steps"] == 2
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| base | run-base, which is base + 0.5·(" in card
    assert "drift-peft merge --base run-base --adapter" in card
    said = capsys.readouterr().out
    assert f"{base} is the base with 0.5·Δ merged into it" in said and run["merge"]["verification"]["verdict"] in said

    full = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(full, str(output)).eval()
    alone = AutoModelForImageTextToText.from_pretrained(tmp_path / "run-merged", dtype=torch.float32).eval()
    tokens = torch.arange(7, 20)[None]
    assert torch.allclose(alone(tokens).logits, adapted(tokens).logits, atol=1e-4)

    made = (base / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(output)
    with pytest.raises(SystemExit, match=r"run-base exists and is .* \+ 0.5·\(.*, not .* \+ 0.25·"):
        train(**FAST, merge_first=0.25)
    train(**FAST, merge_first=0.5)
    assert (base / "model.safetensors").stat().st_mtime_ns == made


def test_sft_goes_on_from_it_too(train, tmp_path):
    """Also from a base that has all of Δ, where there is nothing to steer toward."""
    _, output = train(**FAST, merge_first=1.0, method="sft", prior=None)
    assert record(output)["merged_first"]["scale"] == 1.0 and record(output)["prior"] is None
    assert "which is" in (output / "README.md").read_text(encoding="utf-8")
    other = {**FAST, "output_dir": tmp_path / "other"}
    for settings, told in (
        ({"merge_first": 1}, "merge_first=1 leaves nothing to steer toward: set method to sft, or merge less"),
        ({"merge_first": 0}, "merge_first is the share of Δ to merge, such as 0.5, got 0.0"),
        ({"merge_first": "nan"}, "merge_first is the share of Δ to merge, such as 0.5, got nan"),
        ({"merge_first": 0.5, "method": "sft", "prior": None, "expert": None}, "merge_first=0.5 merges.*: set expert"),
        ({"method": "stf"}, r"method takes one of drift, sft, not stf; did you mean sft\?"),
    ):
        with pytest.raises(SystemExit, match=told):
            train(**{**other, **settings})
    assert not (tmp_path / "other").exists() and not (tmp_path / "other-base").exists()


def test_resuming_a_finished_run_does_nothing(train, tmp_path, capsys):
    """But what it was asked to do afterwards; and with other settings it says what they would have to be."""
    settings = {**FAST, "save_steps": 1}
    train(**settings)
    output = tmp_path / "run"
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    trainer, _ = train(**settings, resume_from_checkpoint="true")
    assert trainer is None and f"The run in {output} was finished before, after 2 steps." in capsys.readouterr().out
    with pytest.raises(
        SystemExit,
        match=r"checkpoint-2 has taken 2 steps, these settings ask for no more, .*: raise num_train_epochs",
    ):
        train(**{**settings, "max_steps": 1}, resume_from_checkpoint="true")
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    train(**settings, resume_from_checkpoint="true", merge=True, verify=False)
    assert record(output)["merge"]["verification"] is None and (tmp_path / "run-merged").is_dir()
    assert "was compared with nothing" in capsys.readouterr().out
    train(**settings, resume_from_checkpoint="true", merge=True, verify=False)
    assert f"The merged model is in {tmp_path / 'run-merged'}.\n" in capsys.readouterr().out
    trainer, _ = train(**{**settings, "max_steps": 3}, resume_from_checkpoint="true")
    assert trainer.state.global_step == record(output)["results"]["steps"] == 3


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_that_went_on_does_not_give_the_time_of_the_rest_for_its_own(left, train):
    """With steps left, and stopped after its last checkpoint."""
    settings = {**FAST, "save_steps": 1}
    _, output = train(**settings)
    whole = record(output)["results"]
    (output / "run.json").unlink()
    if left:
        shutil.rmtree(output / "checkpoint-2")
    train(**settings, resume_from_checkpoint="true")
    assert whole.keys() - record(output)["results"].keys() >= {"train_runtime", "train_loss"}
    assert record(output)["results"]["steps"] == whole["steps"] == 2


def test_a_run_that_was_killed_after_its_last_checkpoint_is_only_saved(train, tmp_path):
    settings = {**FAST, "save_steps": 2}
    _, output = train(**settings, output_dir=tmp_path / "whole")
    whole, steps = weights(output), record(output)["results"]
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json"):
        (output / name).unlink()
    train(**settings, output_dir=output, resume_from_checkpoint="true")
    again = weights(output)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    assert record(output)["results"]["guided_steps"] == steps["guided_steps"] == record(output)["results"]["steps"]


@pytest.mark.parametrize("at", [0, 3])
def test_ctrl_c_names_the_way_on(at, train, tmp_path, monkeypatch):
    step = sft_vlm.Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    settings = {**FAST, "max_steps": 4, "save_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr(sft_vlm.Trainer, "training_step", interrupted)
        train(**settings)
    told = str(stopped.value)
    command = re.search(rf"python {re.escape(sft_vlm.__file__)} --base .* --save_steps 2", told)
    assert command
    if at:
        assert told.startswith(f"stopped; {tmp_path / 'run' / 'checkpoint-2'} is kept: go on with python ")
        assert told.endswith(f"{command[0]} --resume-from-checkpoint true")
    else:
        assert told == f"stopped before the first checkpoint: start again with {command[0]}"


def test_ctrl_c_names_the_command_as_it_was_called(tmp_path, monkeypatch):
    """From wherever that was, and with which Python."""
    called = [".venv/bin/python", "-u", "../my recipes/sft_vlm.py", "--config", "a.yaml"]
    monkeypatch.setattr(sys, "orig_argv", called)
    with pytest.raises(KeyboardInterrupt) as stopped, sft_vlm.telling_the_way_on(None, tmp_path):
        raise KeyboardInterrupt
    again = ".venv/bin/python -u '../my recipes/sft_vlm.py' --config a.yaml"
    assert str(stopped.value) == f"stopped before the first checkpoint: start again with {again}"


def test_more_than_all_of_delta_is_steered_back_and_that_is_said(train, tmp_path, capsys):
    train(**FAST, merge_first=2)
    assert "merge_first=2 is more than all of Δ: DRIFT steers back, toward base + Δ." in capsys.readouterr().out
    train(**FAST, merge_first=0.5, output_dir=tmp_path / "half")
    assert "steers back" not in capsys.readouterr().out


def test_too_little_memory_to_verify_is_told_before_anything_is_loaded(train, tmp_path, monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: memory(1000))
    assert psutil.virtual_memory().available == 1000
    with pytest.raises(SystemExit, match=r"in fp32, which takes .* GB of memory, and 1e-06 GB are free: make room"):
        train(**FAST, merge=True)
    assert not (tmp_path / "run").exists()
    train(**FAST, merge=True, verify=False)
    assert (tmp_path / "run-merged").is_dir()
