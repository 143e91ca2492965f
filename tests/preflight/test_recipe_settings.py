"""What recipes/sft_vlm.py refuses of a recipe before it reads a model, preflight refuses in the same words."""

import shutil

import pytest
import sft_vlm
import yaml
from parts.arguments import parse
from trl import SFTConfig

from drift_peft.preflight.cards import read_settings, trl_choices

RECIPE = {"base": "b", "data": "d.jsonl", "prior": "p.safetensors", "expert": "e", "output_dir": "run", "use_cpu": True}
RECIPE |= {"bf16": False, "max_steps": 1}
KEEP = {"keep": "k.safetensors"}


def save(folder, changes):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return str(folder / "recipe.yaml")


def run(recipe):
    sft_vlm.check(*parse(["--config", recipe], sft_vlm.__doc__))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("changes, told", [
    (KEEP | {"drift_norm": "weight"}, "does not see the gradient that keep adds: set drift_norm"),
    ({"replay": 0.2}, "takes the answers of a keep set: name one with keep"),
    ({"replay": 1, **KEEP}, "replay is a share of the training samples"),
    ({"replay": 0.2, **KEEP, "streaming": True}, "whose size streaming does not know"),
    ({"keep_bound": 0}, "keep_bound is a number above 0, such as 1, got 0"),
    ({"keep_samples": 0}, "keep_samples must be a whole number ≥ 1, got 0"),
    ({"prior": None}, "method drift needs a prior: name the file to build it in, or set method to sft"),
    ({"data": None}, "data"),
    ({"merge_first": 0}, "merge_first is the share of Δ to merge, such as 0.5, got 0"),
    ({"merge_first": 1}, "leaves nothing to steer toward: set method to sft"),
    ({"merge_first": 1, "drift_alpha": 0, "drift_start": 0.5}, "leaves nothing to steer toward: set method to sft"),
    ({"merge_first": 0.5, "method": "sft", "expert": None}, "merges a part of expert − base: set expert"),
    ({"streaming": True, "max_steps": -1}, "sets no number of steps for streaming: true"),
    ({"num_train_epochs": 0, "max_steps": -1}, "sets no number of steps for 0"),
    ({"drift_alpha": -1}, "drift_alpha=-1 is negative"),
    ({"drift_norm": "weight", "drift_target": "factors"}, "set drift_target='residual' or 'delta'"),
    ({"drift_spectrum": 5}, "drift_spectrum must be 'full', 'flat' or a power between 0 and 4, got 5"),
    ({"drift_spectrum": "["}, "drift_spectrum=[ is no YAML: "),
    ({"drift_warmup_steps": -1}, "drift_warmup_steps must be a whole number ≥ 0, got -1"),
    ({"drift_alpha_pattern": {"(": 1}}, "no regular expression"),
    ({"drift_scale": "adptive"}, "drift_scale takes one of adaptive, gradnorm, absolute, decoupled, not adptive; did"),
    ({"drift_target": "deltaa"}, "drift_target takes one of residual, delta, factors, base, not deltaa; did you mean"),
    ({"method": "sft", "drift_norm": "wieght"}, "drift_norm takes one of factor, weight, not wieght; did you mean"),
    ({"method": "stf"}, "method takes one of drift, sft, not stf; did you mean sft?"),
    ({"on_bad": "drpo"}, "on_bad takes one of drop, fail, not drpo; did you mean drop?"),
    ({"save_strategy": "sometimes"}, "save_strategy takes one of no, steps, epoch, best, not sometimes"),
    ({"lr_scheduler_type": "cosin"}, "not cosin; did you mean cosine?"),
    *(({"optim": name}, f"not {name}") for name in ("paged_sgd", "paged_adafactor", "adamw_32bit", "ademamix_32bit")),
    ({"num_train_epochs": "many"}, "num_train_epochs takes a number, got 'many'"),
    ({"lora_alpha": "x"}, "lora_alpha takes a whole number, got 'x'"),
    ({"use_rslora": "maybe"}, "use_rslora takes yes or no, got 'maybe'"),
    ({"env": [1]}, "env takes settings such as {name: value}, got [1]"),
    ({"max_length": 64}, "max_length cuts samples, and their images' tokens with them: set max_tokens instead"),
    ({"packing": True}, "packing=True cannot be: samples with images cannot be packed"),
    ({"padding_free": True}, "padding_free=True cannot be: samples with images are padded"),
    ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 cannot be"),
    ({"save_only_model": True}, "save_only_model=True cannot be"),
    ({"eval_strategy": "steps"}, "eval_strategy=steps cannot be"),
    ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size=1 cannot be"),
    ({"save_strategy": "best"}, "save_strategy=best cannot be"),
    ({"gradient_checkpointing_kwargs": {"selective": True}}, "cannot be: TRL's own way to it fails in the"),
    *(({key: "foo"}, f"{key} takes one of {', '.join(known)}, not foo") for key, known in trl_choices().items()),
])  # fmt: skip
def test_both_refuse_it_in_the_same_words(changes, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = save(tmp_path, changes)
    with pytest.raises((SystemExit, ValueError)) as refused:
        run(recipe)
    assert told in str(refused.value)
    with pytest.raises(ValueError) as estimated:
        read_settings(recipe)
    assert told in str(estimated.value)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("changes", [
    {}, KEEP, KEEP | {"replay": 0.2, "drift_norm": "weight"}, {"method": "sft", "prior": None}, {"expert": None},
    {"method": "sft", "drift_rank": 0}, {"save_strategy": False}, {"eval_strategy": False}, {"packing": False},
    {"pad_to_multiple_of": None}, {"per_device_eval_batch_size": 8}, {"drift_spectrum": 0.5}, {"drift_modules": "attn"},
    {"drift_alpha_pattern": "{mlp: '0.1'}"}, {"env": {"A": "b"}}, {"keep_weight": 0, "drift_norm": "weight", **KEEP},
    {"processor_kwargs": {"size": {"longest_edge": "512"}}}, {"gradient_checkpointing_kwargs": {"selective": False}},
])  # fmt: skip
def test_both_take_it(changes, tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pair.path, "p.safetensors")
    recipe = save(tmp_path, changes)
    run(recipe)
    read_settings(recipe)


@pytest.mark.skipif("choices" not in SFTConfig.__dataclass_fields__["loss_type"].metadata, reason="TRL names none")
def test_what_the_installed_trl_names_is_known_without_it():
    assert trl_choices()["loss_type"] == SFTConfig.__dataclass_fields__["loss_type"].metadata["choices"]


def test_a_run_that_goes_on_is_estimated(tmp_path):
    for value in (True, False, "run/checkpoint-1"):
        read_settings(save(tmp_path, {"resume_from_checkpoint": value}))
