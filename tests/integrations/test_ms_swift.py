"""The tuner `drift` in `swift sft`. `make test-integrations` brings ms-swift."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pairs import drift, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from drift_peft import DriftConfig, telemetry
from drift_peft.integrations import settings

pytest.importorskip("swift", reason="ms-swift is not installed: make test-integrations installs it beside the rest")
from swift import rlhf_main, sft_main

from drift_peft.integrations.ms_swift import DriftTuner


@pytest.fixture
def swift(folder, tmp_path, monkeypatch):
    """`swift sft` with the command line's arguments; returns its last message."""
    (tmp_path / "drift.py").write_text("import drift_peft.integrations.ms_swift\n")
    monkeypatch.chdir(tmp_path)

    def run(*flags, main=sft_main, data="data.json", given=True, **settings):
        settings = {"drift_prior": str(folder / "prior.safetensors"), **settings}
        for key in {key for key in os.environ if key.startswith("DRIFT_")}:  # of the run before
            monkeypatch.delenv(key)
        command = ["--model", str(folder / "base"), "--model_type", "llama", "--template", "dummy", "--use_hf", "true"]
        command += ["--external_plugins", "drift.py", "--tuner_type", "drift"]
        command += ["--model_kwargs", json.dumps(settings)] if given else []
        command += ["--dataset", str(folder / data), "--split_dataset_ratio", "0", "--torch_dtype", "float32"]
        command += ["--max_steps", "2", "--logging_steps", "1", "--save_steps", "2", "--lora_rank", "4"]
        command += ["--output_dir", "out", "--add_version", "false", "--report_to", "none", "--dataset_num_proc", "1"]
        return main([*command, "--use_cpu", "true", "--dataloader_num_workers", "0", *flags])

    return run


def arguments(folder, **changes):
    """What ms-swift hands to a tuner, as far as ours reads it."""
    told = {"model_kwargs": {"drift_prior": str(folder / "prior.safetensors")}, "task_type": "causal_lm"}
    told |= {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_bias": "none", "lora_dtype": None}
    told |= {"target_modules": ["q_proj"], "target_parameters": None, "modules_to_save": [], "init_weights": True}
    told |= dict.fromkeys(["freeze_vit", "freeze_aligner"], True) | {"lorap_lr_ratio": None}
    told |= dict.fromkeys(["use_rslora", "use_dora", "use_swift_lora"], False)
    return SimpleNamespace(**told | changes)


def guided_steps(told):
    return [logs["drift/guided_steps"] for logs in told["log_history"] if "drift/guided_steps" in logs]


def test_lora_is_steered_at_every_step_and_after_a_restart(swift):
    told = swift(drift_alpha=0.5)
    assert guided_steps(told) == [1, 2]
    saved = DriftConfig.from_pretrained("out/checkpoint-2")
    assert (saved.r, saved.drift_alpha, saved.drift_steps) == (4, 0.5, 2)
    assert json.loads(open("out/checkpoint-2/adapter_config.json").read())["peft_type"] == "LORA"
    told = swift("--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2")
    assert guided_steps(told)[-1] == 3


def test_a_restart_has_the_settings_of_its_own_command(swift, folder, monkeypatch):
    """ms-swift gives them to no tuner that loads an adapter."""
    swift(drift_alpha=0.5)
    kept = []
    monkeypatch.setattr(settings, "keep", lambda model, processor, **given: kept.append((model, processor, given)))
    resumed = "--max_steps", "3", "--save_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2"
    keep_set = {"drift_keep": "keep.safetensors", "drift_keep_weight": 0.3, "drift_keep_bound": None}
    swift(*resumed, drift_alpha=0.25, drift_alpha_pattern={"q_proj": 0.1}, **keep_set)
    saved = DriftConfig.from_pretrained("out/checkpoint-3")
    assert (saved.drift_alpha, saved.drift_alpha_pattern, saved.drift_steps) == (0.25, {"q_proj": 0.1}, 3)
    ((model, processor, given),) = kept
    assert isinstance(model, PeftModel) and processor("how many ?")["input_ids"]
    assert given == {"keep_set": "keep.safetensors", "weight": 0.3, "bound": None}


@pytest.mark.parametrize("restart", [False, True])
def test_a_wrong_key_is_one_sentence(swift, restart):
    resumed = ["--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2"] if restart else []
    if restart:
        swift()
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft; did you mean drift_alpha\?"):
        swift(*resumed, drift_alhpa=0.5)


def test_a_restart_without_settings_is_kept_as_the_checkpoint_was(swift, monkeypatch):
    kept = []
    monkeypatch.setattr(settings, "keep", lambda model, processor, **given: kept.append(given))
    swift(drift_alpha=0.5, drift_keep="keep.safetensors", drift_keep_bound=None)
    resumed = "--max_steps", "3", "--save_steps", "3", "--resume_from_checkpoint"
    assert guided_steps(swift(*resumed, "out/checkpoint-2", given=False))[-1] == 3
    assert kept == [{"keep_set": "keep.safetensors", "bound": None}] * 2
    assert DriftConfig.from_pretrained("out/checkpoint-3").drift_alpha == 0.5
    with pytest.raises(ValueError, match=r"^\S*checkpoint-3/args.json does not say how .*: give --model_kwargs"):
        swift(*resumed, "out/checkpoint-3", given=False)


def test_the_weights_that_zero_3_has_gathered_are_saved(folder, tmp_path):
    model = get_peft_model(load(folder, "llama"), drift(folder))
    gathered = {name: torch.full_like(value, 7.0) for name, value in model.state_dict().items()}
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0) if parameter.requires_grad else parameter.data
    DriftTuner.save_pretrained(model, str(tmp_path), state_dict=gathered, safe_serialization=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(value.numel() and (value == 7).all() for value in saved.values())


def test_dpo_with_the_adapter_as_its_own_reference(swift, folder):
    pair = json.loads((folder / "data.json").read_text())[0] | {"rejected_response": "4 + 3 = 8"}
    Path("pairs.json").write_text(json.dumps([pair] * 8))
    swift()
    adapters = "--adapters", "out/checkpoint-2", "--ref_adapters", "out/checkpoint-2"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The adapter .* was trained with guidance")
        told = swift(
            "--rlhf_type", "dpo", *adapters, "--output_dir", "dpo", main=rlhf_main, data=Path("pairs.json").resolve()
        )
    assert guided_steps(told)[-1] == 4
    before, after = (load_file(f"{name}/checkpoint-2/adapter_model.safetensors") for name in ("out", "dpo"))
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)


def test_an_adapter_of_others_is_trained_further_under_guidance(swift, folder):
    plain = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain.save_pretrained("plain")
    assert guided_steps(swift("--adapters", "plain")) == [1, 2]
    assert DriftConfig.stored("out/checkpoint-2")["drift_steps"] == 2
    with pytest.raises(ValueError, match=r"^drift_prior is missing"):
        swift("--adapters", "plain", given=False)


@pytest.mark.parametrize(
    ("flag", "value"), [("lora_dtype", "bfloat16"), ("lorap_lr_ratio", 16.0), ("use_swift_lora", True)]
)
def test_a_flag_that_would_not_act_is_refused(folder, flag, value):
    with pytest.raises(ValueError, match=f"^--{flag} {value} is not available with --tuner_type drift: leave it out"):
        DriftTuner.prepare_model(arguments(folder, **{flag: value}), load(folder, "llama"))


def test_loras_own_flags_act(folder):
    model = DriftTuner.prepare_model(arguments(folder, init_weights="gaussian"), load(folder, "llama"))
    assert model.peft_config["default"].init_lora_weights == "gaussian"
    with pytest.raises(ValueError, match="init_lora_weights='pissa' is not available with guidance"):
        DriftTuner.prepare_model(arguments(folder, init_weights="pissa"), load(folder, "llama"))
    weight = "layers.0.self_attn.k_proj.weight"
    model = DriftTuner.prepare_model(arguments(folder, target_parameters=[weight]), load(folder, "llama"))
    assert model.peft_config["default"].target_parameters == [weight]


@pytest.mark.parametrize(
    ("task", "of_peft"), [("embedding", None), ("generative_reranker", "CAUSAL_LM"), ("decision", "CAUSAL_LM")]
)
def test_task_types_that_ms_swift_calls_by_other_names(folder, task, of_peft):
    model = DriftTuner.prepare_model(arguments(folder, task_type=task), load(folder, "llama"))
    assert model.peft_config["default"].task_type == of_peft and telemetry(model)["guided_steps"] == 0


def test_a_reranker_is_a_classifier_whose_head_is_trained(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    model = DriftTuner.prepare_model(arguments(folder, task_type="reranker"), model)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert any(p.requires_grad for name, p in model.named_parameters() if "score" in name)
