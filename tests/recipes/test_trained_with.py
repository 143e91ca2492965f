"""A checkpoint goes on with what it was trained with, and with nothing else."""

import json
import os
import shutil

import pytest
import sft_vlm
from parts.trained_with import FILE, files_of, mark_of
from recipe_runs import FAST
from safetensors.torch import load_file, save_file

from drift_peft.checkpoints import Checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)
SETTINGS = {**FAST, "save_steps": 1}
RESUMED = {**SETTINGS, "max_steps": 3, "resume_from_checkpoint": "true"}


class LoadedSomething(Exception):
    pass


def load(*_, **__):
    raise LoadedSomething


def test_other_settings_are_refused_before_anything_is_loaded(train, pair, data, tmp_path, monkeypatch):
    train(**SETTINGS)
    monkeypatch.setattr(sft_vlm, "prepare", load)
    folder, checkpoint = pair("qwen2_5_vl"), tmp_path / "run" / "checkpoint-2"
    other, base = pair("qwen2_vl"), folder / "base"
    (tmp_path / "more.jsonl").write_bytes(data.read_bytes())
    step = "per_device_train_batch_size × gradient_accumulation_steps"
    for changed, told in (
        ({"method": "sft"}, "with method=drift, not sft"),
        ({"base": other / "base"}, f"with base={base}, not {other / 'base'}"),
        ({"expert": other / "expert"}, f"with expert={folder / 'expert'}, not {other / 'expert'}"),
        ({"reference": None}, f"with reference={base}, not without"),
        ({"prior": "p.safetensors"}, f"with prior={folder / 'prior.safetensors'}, not p.safetensors"),
        ({"merge_first": 0.5}, "without merge_first, not with 0.5"),
        ({"data": tmp_path / "more.jsonl"}, f"with data={data}, not {tmp_path / 'more.jsonl'}"),
        ({"keep": "k.safetensors"}, "without keep, not with k.safetensors"),
        ({"r": 8}, "with r=4, not 8"),
        ({"lora_alpha": 4}, "with lora_alpha=8, not 4"),
        ({"drift_alpha": 0.1}, "with drift_alpha=0.3, not 0.1"),
        ({"drift_modules": "attn"}, "without drift_modules, not with ['attn']"),
        ({"learning_rate": 1e-4}, "with learning_rate=0.001, not 0.0001"),
        ({"seed": 7}, "with seed=42, not 7"),
        ({"per_device_train_batch_size": 1}, f"with {step}=4, not 2"),
    ):
        with pytest.raises(SystemExit) as refused:
            train(**{**RESUMED, **changed})
        way_out = "change it back, or start again in another output_dir"
        assert str(refused.value) == f"sft_vlm.py: error: {checkpoint} was trained {told}: {way_out}"
    monkeypatch.chdir(folder)  # the same, named in other ways, and what may be another
    free = {"base": f"{base}/", "expert": "expert", "data": os.path.relpath(data), "prior": "prior.safetensors"}
    free |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 2}
    with pytest.raises(LoadedSomething):
        train(**{**RESUMED, **free})
    with pytest.raises(LoadedSomething):  # without a keep set it does not matter how one is used
        train(**{**RESUMED, **free}, keep_weight=0, keep_batch_size=3)


def test_other_files_of_the_same_names_are_refused_before_the_model_is_loaded(train, pair, data, tmp_path, monkeypatch):
    folder = shutil.copytree(pair("qwen2_5_vl") / "base", tmp_path / "base")
    own = shutil.copytree(data.parent, tmp_path / "pictures") / data.name
    paths = {"base": folder, "reference": None, "expert": None, "prior": None, "method": "sft", "data": own}
    paths["chat_template_path"] = shutil.copy(folder / "chat_template.jinja", tmp_path / "chat.jinja")
    train(**SETTINGS, **paths)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    monkeypatch.setattr(sft_vlm, "Trainer", load)
    text = own.read_text(encoding="utf-8")
    own.write_text(text.replace("how many", "many"), encoding="utf-8")
    told = rf"{checkpoint} was trained with another content of data, which is {own}, or this version reads it otherwise"
    with pytest.raises(SystemExit, match=rf"{told} \(see above what is dropped and noted\): put back what was there"):
        train(**RESUMED, **paths)
    own.write_text(text, encoding="utf-8")
    file = folder / "model.safetensors"
    kept = file.read_bytes()
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"with another content of base, which is {folder}: put back what was there"):
        train(**RESUMED, **paths)
    file.write_bytes(kept)  # at another time
    asked_otherwise(chat := tmp_path / "chat.jinja")
    with pytest.raises(SystemExit, match=f"with another content of chat_template, which is {chat}: put back what was"):
        train(**RESUMED, **paths)
    shutil.copy(folder / "chat_template.jinja", chat)
    with pytest.raises(LoadedSomething):
        train(**RESUMED, **paths)


def asked_otherwise(template):
    template.write_text(text := template.read_text().replace("{{ message.role }}: ", "{{ message.role }}: word9 "))
    assert "word9" in text


def test_the_template_of_a_base_is_held_too(train, pair, tmp_path, monkeypatch):
    base = shutil.copytree(pair("qwen2_5_vl") / "base", tmp_path / "base")
    paths = {"base": base, "reference": None, "expert": None, "prior": None, "method": "sft"}
    train(**SETTINGS, **paths)
    monkeypatch.setattr(sft_vlm, "Trainer", load)
    asked_otherwise(base / "chat_template.jinja")
    with pytest.raises(SystemExit, match=f"with another content of chat_template, which is {base}: put back what was"):
        train(**RESUMED, **paths)


def test_a_mark_is_that_of_the_weights_wherever_they_lie(pair, tmp_path):
    base = pair("qwen2_5_vl") / "base"
    assert mark_of(Checkpoint(base)) == mark_of(Checkpoint(shutil.copytree(base, tmp_path / "moved")))
    assert mark_of(Checkpoint(base)) != mark_of(Checkpoint(pair("qwen2_vl") / "base"))


def test_what_is_free_may_change_and_the_checkpoints_say_it(train, tmp_path, capsys):
    train(**SETTINGS)
    free = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_total_limit": 2}
    trainer, output = train(**{**RESUMED, **free})
    assert trainer.state.global_step == 3 and "It does not say" not in capsys.readouterr().out
    held = json.loads((output / "checkpoint-3" / FILE).read_text(encoding="utf-8"))
    assert held["settings"]["r"] == 4 and {*held["files"]} == {"base", "chat_template", "data", "prior", "keep"}


def test_a_finished_run_is_known_by_what_decides_its_weights(train, pair, tmp_path, monkeypatch, capsys):
    _, output = train(**SETTINGS)
    monkeypatch.setattr(sft_vlm, "fine_tune", load)
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(output, tmp_path / "moved")
    free = {"logging_steps": 2, "save_steps": 2, "base": os.path.relpath(pair("qwen2_5_vl") / "base")}
    for again in ({}, {"output_dir": "run"}, {"output_dir": moved, "merge": True, "verify": False}, free):
        assert train(**{**SETTINGS, **again}, resume_from_checkpoint="true")[0] is None
        assert "was finished before, after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "moved-merged" / "model.safetensors").exists()
    for other in ({"learning_rate": 1e-4}, {"max_steps": 3}):
        with pytest.raises(LoadedSomething):
            train(**{**SETTINGS, **other}, resume_from_checkpoint="true")


def refuses_other_content(train, run, key, file, other, output):
    """Of a finished run, as long as `other(file)` lies where `run[key]` was."""
    content = file.read_bytes()
    other(file)
    told = f"{output} was finished with another content of {key}, which is {run[key]}: put back what was"
    with pytest.raises(SystemExit, match=told):
        train(**run, resume_from_checkpoint="true")
    file.write_bytes(content)


def longer(file):
    file.write_bytes(file.read_bytes() + b"\n")


def other_weights(file):
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_finished_run_is_not_taken_for_one_of_other_files(train, pair, data, tmp_path, capsys):
    base = shutil.copytree(pair("qwen2_5_vl") / "base", tmp_path / "base")
    own = shutil.copytree(data.parent, tmp_path / "pictures") / data.name
    run = {**FAST, "base": base, "reference": None, "expert": None, "prior": None, "method": "sft", "data": own}
    run["chat_template_path"] = chat = tmp_path / "chat.jinja"
    shutil.copy(base / "chat_template.jinja", chat)
    train(**run)
    refuses_other_content(train, run, "data", own, longer, tmp_path / "run")
    refuses_other_content(train, run, "base", base / "model.safetensors", other_weights, tmp_path / "run")
    refuses_other_content(train, run, "chat_template_path", chat, asked_otherwise, tmp_path / "run")
    assert train(**run, resume_from_checkpoint="true")[0] is None
    assert "was finished before" in capsys.readouterr().out


def test_of_data_in_a_folder_all_files_that_are_read_count(tmp_path):
    """And no others, such as those of a run whose output is there, or another split."""
    run = dict.fromkeys(("base", "merge_first", "prior", "keep", "chat_template_path")) | {"split": "train"}
    run["data"] = str(tmp_path)
    long = "\n".join(json.dumps({"question": f"{i}", "answer": "B"}) for i in range(20_000))
    (tmp_path / "train.jsonl").write_text(long)
    before = files_of(run)["data"]
    (tmp_path / "run").mkdir()
    for other in ("notes.txt", "test.jsonl", "run/run.json"):
        (tmp_path / other).write_text("{}")
    assert files_of(run)["data"] == before is not None
    (tmp_path / "train.jsonl").write_text(long.replace('"12345", "answer": "B"', '"12345", "answer": "C"'))
    assert files_of(run)["data"] not in (before, None)
    (tmp_path / "train.jsonl").unlink()
    assert "data" not in files_of(run)


def test_a_finished_run_needs_its_base_no_more(train, pair, tmp_path, capsys):
    """Nor what was merged into it: their weights may be deleted, to make room."""
    run = {**FAST, "merge_first": 0.5, "method": "sft", "prior": None}
    for key in ("base", "expert", "reference"):
        run[key] = shutil.copytree(pair("qwen2_5_vl") / key.replace("reference", "base"), tmp_path / key)
    train(**run)
    for key in ("base", "expert", "reference"):
        (run[key] / "model.safetensors").unlink()
        assert train(**run, resume_from_checkpoint="true")[0] is None
        shutil.rmtree(run[key])
        run[key].mkdir()
        assert train(**run, resume_from_checkpoint="true")[0] is None
        assert capsys.readouterr().out.count("was finished before") == 2


def test_a_finished_run_is_not_taken_for_one_of_another_expert(train, pair, tmp_path, capsys):
    run = {**FAST, "merge_first": 0.5, "method": "sft", "prior": None}
    for key in ("expert", "reference"):
        run[key] = shutil.copytree(pair("qwen2_5_vl") / key.replace("reference", "base"), tmp_path / key)
    train(**run)
    for key in ("expert", "reference"):
        refuses_other_content(train, run, key, run[key] / "model.safetensors", other_weights, tmp_path / "run")
    assert train(**run, resume_from_checkpoint="true")[0] is None
    assert "was finished before" in capsys.readouterr().out


def test_an_adapter_as_expert_has_a_mark_of_its_own(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    run = dict.fromkeys(("reference", "prior", "keep", "chat_template_path"))
    run |= {"base": "a/b", "data": "c/d", "expert": str(tmp_path), "merge_first": 1.0}
    before = files_of(run)
    assert before == files_of(run) and before["base"] is before["reference"] is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert files_of(run)["expert"] != before["expert"]


def test_a_run_without_checkpoints_is_finished_nevertheless(train, tmp_path, capsys):
    _, output = train(**FAST, save_strategy="no")
    held, flag = f"{output} holds an earlier run: ", "add --resume-from-checkpoint true, or "
    with pytest.raises(SystemExit, match=f"{held}{flag}change output_dir$"):
        train(**FAST, save_strategy="no")
    trainer, _ = train(**FAST, save_strategy="no", resume_from_checkpoint="true", merge=True, verify=False)
    assert trainer is None and (tmp_path / "run-merged").exists()
    other = {**FAST, "r": 2}
    with pytest.raises(SystemExit, match=f"{held}change output_dir$"):
        train(**other)
    with pytest.raises(SystemExit, match="was finished with other settings, and left no checkpoint to go on from: cha"):
        train(**other, resume_from_checkpoint="true")


def test_a_checkpoint_that_does_not_say_is_gone_on_from_with_a_word(train, capsys):
    _, output = train(**SETTINGS)
    (output / "checkpoint-2" / FILE).unlink()
    train(**RESUMED)
    assert "It does not say with which settings it was trained" in capsys.readouterr().out
