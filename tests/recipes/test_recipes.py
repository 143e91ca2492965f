"""recipes/: every configuration runs on a tiny pair of its real classes, and what goes wrong is one sentence."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import plot_run as plot_run_command
import pytest
import sft_vlm
import torch
import yaml
from matplotlib.figure import Figure
from parts.arguments import parse
from parts.command_line import run_script
from parts.curves import plot_run
from parts.loading import load_messages
from parts.training_data import describe
from peft import PeftModel
from PIL import Image
from recipe_runs import CONFIGS, FAST
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_loss_is_on_the_answer_and_images_keep_their_positions(train):
    trainer, _ = train(**FAST)
    batch = next(iter(trainer.get_train_dataloader()))
    words = trainer.processing_class.tokenizer
    answers = [words.decode(row[label != -100]) for row, label in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert all(re.fullmatch(r"(?:<unk>|<think>) \d \+ \d = \d (?:<unk>|</think>) \d ?</s>", text) for text in answers)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == 3)  # else rotary positions ignore images


def test_the_merge_is_verified_and_stands_alone(train, pair):
    _, output = train(**FAST, merge=True)
    merged = Path(f"{output}-merged")
    report = json.loads((output / "run.json").read_text(encoding="utf-8"))["merge"]
    assert report["modules"] == 14 and report["logits_error"] < 1e-3
    base = AutoModelForImageTextToText.from_pretrained(pair("qwen2_5_vl") / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(output)).eval()
    alone = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    tokens = torch.arange(7, 20)[None]
    assert torch.allclose(alone(tokens).logits, adapted(tokens).logits, atol=1e-4)
    assert AutoProcessor.from_pretrained(merged).chat_template


def test_an_interrupted_run_goes_on_to_the_same_weights(train, tmp_path, monkeypatch):
    """Of whose checkpoints the one that it goes on from is deleted before it ends."""
    settings = {**FAST, "max_steps": 4, "save_steps": 2, "save_total_limit": 1, "lora_dropout": 0.1}
    train(**settings, output_dir=tmp_path / "whole")

    step, calls = sft_vlm.Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if calls[-1] == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft_vlm.Trainer, "training_step", interrupted)
        train(**settings)
    trainer, output = train(**settings, resume_from_checkpoint="true")
    assert trainer.state.global_step == 4
    whole, resumed = weights(tmp_path / "whole"), weights(output)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]["guided_steps"] == 4


@pytest.fixture
def largest_file():
    """Set the size that a file may have, or None; a write beyond it fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room_for_adapter", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_costs_nothing_that_was_saved(room_for_adapter, train, tmp_path, monkeypatch, largest_file):
    settings = {**FAST, "max_steps": 4, "save_steps": 2}
    train(**settings, output_dir=tmp_path / "whole")
    size = (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size
    step = sft_vlm.Trainer.training_step

    def full(self, *args, **kwargs):
        if self.state.global_step == 3:
            largest_file(3 * size // 2 if room_for_adapter else size // 2)
        return step(self, *args, **kwargs)

    output = tmp_path / "run"
    told = (
        "checkpoint-4 could not be written .*adapter as of" if room_for_adapter else "the adapter could not be written"
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=rf"{told}.*--resume-from-checkpoint.*-2$"):
        patch.setattr(sft_vlm.Trainer, "training_step", full)
        train(**settings)
    largest_file(None)
    left = {path.name for path in output.iterdir()}
    assert "checkpoint-2" in left and "checkpoint-4" not in left and not any("tmp" in name for name in left)
    assert ("adapter_model.safetensors" in left) == room_for_adapter
    whole = weights(tmp_path / "whole")
    if room_for_adapter:
        kept = weights(output)
        assert all(torch.equal(whole[key], kept[key]) for key in whole)
    train(**settings, resume_from_checkpoint=output / "checkpoint-2")
    resumed = weights(output)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


SCALES = "adaptive, gradnorm, absolute, decoupled"
NEGATIVE = "drift_alpha={0} is negative: a positive strength pulls toward the expert here, so where the paper writes "
NEGATIVE += "α = {0} set drift_alpha={1}."
CUTS = "max_length cuts samples, and their images' tokens with them: set max_tokens instead"


@pytest.mark.parametrize(
    ("settings", "flag", "file"),
    [
        ({"drift_alhpa": 1}, "unknown flag --drift_alhpa; did you mean --drift-alpha?",
                             "unknown key drift_alhpa; did you mean drift_alpha?"),
        ({"lerning_rate": 1}, "unknown flag --lerning_rate; did you mean --learning-rate?",
                              "unknown key lerning_rate; did you mean learning_rate?"),
        ({"exprt": "x"}, "unknown flag --exprt; did you mean --expert?", "unknown key exprt; did you mean expert?"),
        ({"zzzzzz": "x"}, "unknown flag --zzzzzz; see sft_vlm.py --help", "unknown key zzzzzz; see --help"),
        ({"load_in_4bit": True}, "unknown flag --load_in_4bit; the recipe always loads the base in 4 bit: leave it out",
                                 "unknown key load_in_4bit; the recipe always loads the base in 4 bit: leave it out"),
        ({"drift_scale": "adaptve"}, f"--drift-scale takes one of {SCALES}, not adaptve; did you mean adaptive?",
                                     f"drift_scale takes one of {SCALES}, not adaptve; did you mean adaptive?"),
        ({"on_bad": "fial"}, "--on-bad takes one of drop, fail, not fial; did you mean fail?",
                             "on_bad takes one of drop, fail, not fial; did you mean fail?"),
        ({"r": "many"}, "--r takes a whole number, got many", "r takes a whole number, got 'many'"),
        ({"merge_first": "abc"}, "--merge-first takes a number or null, got abc",
                                 "merge_first takes a number, got 'abc'"),
        ({"save_total_limit": "abc"}, "--save-total-limit takes a whole number or null, got abc",
                                      "save_total_limit takes a whole number, got 'abc'"),
        ({"drift_alpha": -1}, NEGATIVE.format("-1.0", "1.0"), NEGATIVE.format("-1", "1")),
        ({"max_length": 512}, CUTS, CUTS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["flag", "file"])
def test_a_wrong_setting_is_refused_by_name(settings, flag, file, where, train, tmp_path):
    config = None
    if where == "file":
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as refused:
        train(config=config, **({} if config else settings))
    assert str(refused.value) == f"sft_vlm.py: error: {file if config else flag}"
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_file_and_structured_settings_can_be_flags(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("{base: b, data: d, prior: p.safetensors, r: 8, drift_modules: [attn], drift_spectrum: 0.5}")
    patterns = [
        "--drift_alpha_pattern",
        '{"layers.0.mlp.up_proj": 0}',
        "--processor_kwargs",
        "{size: {longest_edge: 8}}",
    ]
    run, drift, _ = parse(["--config", str(config), "--r", "2", "--use_cpu", *patterns], sft_vlm.__doc__)
    assert (drift.r, drift.drift_modules, drift.drift_spectrum) == (2, ["attn"], 0.5)
    assert drift.drift_alpha_pattern == {"layers.0.mlp.up_proj": 0}
    assert run.processor_kwargs == {"size": {"longest_edge": 8}}
    twice = ["--drift-modules", "mlp", "--drift_modules", "norm", "head", "--use-cpu"]
    assert parse(["--config", str(config), *twice], sft_vlm.__doc__)[1].drift_modules == ["mlp", "norm", "head"]


def test_without_a_gpu_it_needs_to_be_told_so(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"there is no CUDA device.*--use-cpu"):
        train(use_cpu=False)


def test_what_would_fail_in_the_end_fails_before_anything_is_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vlm, "prepare", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "adapter_config.json").touch()
    (tmp_path / "run-merged").mkdir()
    (tmp_path / "torn.safetensors").touch()
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    for settings, told in (
        ({"keep": other}, "other.safetensors is a safetensors file but no keep set"),
        ({"keep": tmp_path / "torn.safetensors"}, "torn.safetensors is no keep set"),
        ({"prior": other}, "other.safetensors is a safetensors file but no prior"),
        ({"output_dir": tmp_path / "file"}, "file cannot be written: .*file is no folder"),
        ({"output_dir": tmp_path / "earlier"}, "earlier holds an earlier run: change output_dir"),
        ({"resume_from_checkpoint": "true"}, "no checkpoint"),
        ({"resume_from_checkpoint": tmp_path / "gone"}, "no checkpoint .*gone"),
        ({"merge": True}, "run-merged exists"),
        ({"prior": tmp_path / "gone.safetensors", "expert": None}, "no prior .*gone.safetensors, and no expert"),
    ):
        with pytest.raises(SystemExit, match=told):
            train(**settings)


def test_bad_data_is_told_before_the_model_is_loaded(train, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vlm, "open_prior", lambda _: pytest.fail("the prior was opened"))
    lines = data.read_text(encoding="utf-8").replace('"0.png"', '"gone.png"')
    for file in data.parent.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "bad.jsonl").write_text(lines)
    for settings, told in (
        ({"data": tmp_path / "gone.jsonl"}, "gone.jsonl"),
        ({"data": tmp_path / "bad.jsonl", "on_bad": "fail"}, "gone.png"),
        ({"max_tokens": 5, "on_long": "fail"}, "tokens"),
        ({"max_tokens": 5}, "sample 1 .* tokens"),
    ):
        with pytest.raises(SystemExit, match=rf"sft_vlm\.py: error: .*{told}"):
            train(**settings)
        assert not (tmp_path / "run").exists()


def test_what_is_dropped_is_counted(train, data, tmp_path):
    lines = data.read_text(encoding="utf-8").replace('"0.png"', '"gone.png"')
    lines = lines.replace("how many", "how " * 200 + "many", 2).replace("how " * 200, "", 1)
    for file in data.parent.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bad.jsonl").write_text(lines)
    _, output = train(**FAST, data=tmp_path / "bad.jsonl", max_tokens=100)
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["samples"] == 6
    assert sum(run["data"]["dropped"].values()) == 2 and run["data"]["dropped"]["longer than 100 tokens"] == 1


def test_the_fingerprint_is_that_of_the_data(data, tmp_path):
    def sha256(folder):
        return describe(load_messages(folder / "data.jsonl")[0])["sha256"]

    for folder in ("same", "other"):
        (tmp_path / folder).mkdir()
        for file in data.parent.iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "3.png")
    assert sha256(data.parent) == sha256(tmp_path / "same") != sha256(tmp_path / "other")


def test_a_stream_trains(train):
    _, output = train(**FAST, streaming=True)
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["data"]["samples"] is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dataloader_drop_last": True}, "8 samples are no batch of per_device_train_batch_size=16, and"),
        ({"dataloader_drop_last": True, "streaming": True}, "8 samples are no batch of per_device"),
        ({"max_steps": -1, "num_train_epochs": 0}, r"max_steps=-1 sets no number of steps for 0\.0 epochs: set max_s"),
        ({"max_steps": -1, "streaming": True}, "max_steps=-1 sets no number of steps for streaming: true, whose len"),
    ],
)
def test_a_run_without_a_step_is_refused(settings, told, train, tmp_path):
    with pytest.raises(SystemExit, match=rf"^sft_vlm\.py: error: {told}"):
        train(**{**FAST, "per_device_train_batch_size": 16, **settings})
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_stream_of_which_nothing_is_left_is_one_sentence(train, data, tmp_path):
    told = rf"no sample of {data} is left: 8 longer than 5 tokens \(sample 1 of {data} has \d+ tokens"
    with pytest.raises(SystemExit, match=told):
        train(**FAST, streaming=True, max_tokens=5)
    assert not (tmp_path / "run").exists()


def test_a_stream_is_shuffled_by_the_seed_and_goes_on_in_its_order(train, tmp_path, monkeypatch):
    """In the second pass, too."""
    seen, step = [], sft_vlm.Trainer.training_step

    def watched(self, model, inputs, *args):
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    def run(name, **settings):
        seen.clear()
        settings = {**FAST, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, **settings}
        settings |= {"lr_scheduler_type": "constant"}  # which does not ask for the length
        _, output = train(**settings, streaming=True, save_steps=1, output_dir=tmp_path / name)
        return [*seen], weights(output)

    monkeypatch.setattr(sft_vlm.Trainer, "training_step", watched)
    whole, ended = run("whole", max_steps=4)
    assert run("other", max_steps=4, seed=7)[0] != whole
    plain, _ = run("plain", max_steps=4, train_sampling_strategy="sequential")
    assert plain[:2] == plain[2:] and whole[:2] != plain[:2]
    run("stopped", max_steps=3)
    rest, resumed = run("stopped", max_steps=4, resume_from_checkpoint="true")
    assert rest == whole[3:] and all(torch.equal(ended[key], resumed[key]) for key in ended)


def test_a_prior_of_another_pair_is_refused(train, pair, tmp_path):
    train(**FAST)  # builds it
    prior = pair("qwen2_5_vl") / "prior.safetensors"
    other = {"expert": pair("qwen2_vl") / "expert", "output_dir": tmp_path / "other"}
    with pytest.raises(SystemExit, match=r"was built with the expert .*, not .*: change expert or prior"):
        train(**FAST, **other)
    with pytest.raises(SystemExit, match="was built for other base weights"):
        train("qwen2_vl", **FAST, prior=prior, expert=None, reference=None, output_dir=tmp_path / "other")
    assert not (tmp_path / "other" / "adapter_config.json").exists()


def test_a_prior_with_a_reference_that_is_no_longer_named_is_refused(train, pair, tmp_path, capsys):
    ancestor = shutil.copytree(pair("qwen2_5_vl") / "base", tmp_path / "ancestor")
    prior = tmp_path / "prior.safetensors"
    train(**FAST, prior=prior, reference=ancestor)
    assert "is used as it is" not in capsys.readouterr().out
    again = {**FAST, "prior": prior, "output_dir": tmp_path / "again"}
    told = f"{prior} was built with the reference {ancestor}, not without: name it in reference, or change prior"
    with pytest.raises(SystemExit, match=told):
        train(**again, reference=None)
    train(**{**again, "prior_rank": 4}, reference=ancestor)
    told = f"The rank of {prior} is 8, and it is used as it is: prior_rank=4 is for one that is built."
    assert told in capsys.readouterr().out


def test_two_paths_to_one_expert_are_one(train, pair, tmp_path, monkeypatch):
    """A slash at the end, and a path from another folder; but not a folder with @ in its name."""
    train(**FAST)
    expert, prior = pair("qwen2_5_vl") / "expert", pair("qwen2_5_vl") / "prior.safetensors"
    monkeypatch.chdir(expert.parent.parent)
    for number, named in enumerate((f"{expert}/", os.path.relpath(expert))):
        train(**FAST, expert=named, output_dir=tmp_path / str(number))
    other = Path(f"{expert}@2")
    other.symlink_to(pair("qwen2_vl") / "expert")
    with pytest.raises(SystemExit, match=r"was built with the expert .*expert, not .*expert@2: change expert or prior"):
        train(**FAST, expert=other, output_dir=tmp_path / "other")
    origin = {"id": "org/expert", "revision": "a" * 40}
    assert sft_vlm.is_same_model("org/expert@1", origin) and not sft_vlm.is_same_model("org/expert", None)
    assert prior.exists()


def test_a_prior_of_another_commit_of_the_expert_is_refused(monkeypatch):
    """A branch or a tag may have been this commit."""
    origin = {"id": "org/expert", "revision": "a" * 40}
    prior = Mock(metadata={"expert": origin})
    monkeypatch.setattr(sft_vlm.ReasoningPrior, "load", lambda file: prior)
    for expert in ("org/expert", "org/expert@main", f"org/expert@{'a' * 40}"):
        assert sft_vlm.open_prior(sft_vlm.RunArguments("b", "d", prior="org/prior", expert=expert)) is prior
    run = sft_vlm.RunArguments("b", "d", prior="org/prior", expert=f"org/expert@{'b' * 40}")
    told = f"org/prior was built with the expert org/expert@{'a' * 40}, not with {run.expert}: change expert or prior"
    with pytest.raises(ValueError, match=told):
        sft_vlm.open_prior(run)


# Its own head, and one tied to the embedding.
@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "gemma3"])
def test_think_tags_are_trained_as_tokens_within_the_vocabulary(family, train, pair):
    trainer, output = train(family, **FAST, think_tokens=True, merge=True)
    for folder in (output, f"{output}-merged"):
        ids = AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert ids == [40, 41]
    tied = "lm_head" not in json.loads((output / "adapter_config.json").read_text())["trainable_token_indices"]
    assert tied == (family == "gemma3")
    before = trainer.model.get_input_embeddings().original_module.weight[ids].float()
    trained = [weight for key, weight in weights(output).items() if "trainable_tokens" in key]
    assert len(trained) == 2 - tied and all(weight.shape == before.shape for weight in trained)
    assert all((weight != before).any(1).all() for weight in trained)
    assert len(trainer.model.get_input_embeddings().weight) == 64  # not resized
    batch = next(iter(trainer.get_train_dataloader()))
    assert {40, 41} <= set(batch["input_ids"].flatten().tolist())


def test_think_tags_that_have_no_room_are_refused(train, pair, tmp_path):
    folder = pair("qwen2_5_vl", rows=63)
    with pytest.raises(SystemExit, match="has no row left for <think> and </think> among its 64 embeddings"):
        train(**FAST, think_tokens=True, base=folder / "base", prior=folder / "prior.safetensors")
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_drawn_again(tmp_path):
    history = [
        {"step": 1, "loss": 2.0, "drift/absorbed": 0.1, "drift/absorbed/attn": 0.2},
        {"step": 1, "train_loss": 2},
    ]
    plot_run(history, tmp_path / "run.png")
    (tmp_path / "run.json").write_text(json.dumps({"history": history}))
    again = tmp_path / "again.png"
    plot_run_command.main([str(tmp_path / "run.json"), str(again)])
    assert again.read_bytes() == (tmp_path / "run.png").read_bytes()
    plot_run([{"step": 1, "train_loss": 2}], tmp_path / "short.png")  # fewer steps than logging_steps
    assert Image.open(tmp_path / "short.png").width == Image.open(again).width


def test_the_command_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--config", str(CONFIGS / "qwen2_5_vl_7b_r1.yaml"), "--lr", "1e-4"]
    with pytest.raises(SystemExit) as end:
        run_script("sft_vlm.py", lambda: sft_vlm.main(command))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.strip().splitlines()[-1].startswith("sft_vlm.py: error: unknown flag --lr")
    assert not list(tmp_path.iterdir())


def test_shares_of_delta_are_drawn_from_0_to_1(tmp_path, monkeypatch):
    """Unless they go beyond, as the paper's constant direction lets them."""
    figures = []
    monkeypatch.setattr("parts.curves.Figure", lambda **settings: figures.append(Figure(**settings)) or figures[-1])
    for last, limits in ((0.1, (0, 1)), (3.0, (0, 3.0))):
        history = [{"step": i, "loss": 2.0, "drift/absorbed": i * last, "drift/keep_kl": 0.1} for i in (0, 1)]
        plot_run(history, tmp_path / "run.png")
        panels = {panel.get_title(): panel for panel in figures[-1].axes}
        low, high = panels["of Δ absorbed by the adapter"].get_ylim()
        assert limits[0] - 0.2 <= low <= limits[0] and limits[1] <= high < limits[1] * 1.1
        assert "kept: nats from the VLM per answer token" in panels
