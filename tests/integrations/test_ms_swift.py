"""The tuner `drift` in `swift sft`. `make test-integrations` brings ms-swift."""

import json
import os

import pytest
from peft import PeftModel

from drift_peft import DriftConfig
from drift_peft.integrations import settings

pytest.importorskip("swift", reason="ms-swift is not installed: make test-integrations installs it beside the rest")
from swift import sft_main


@pytest.fixture
def swift(folder, tmp_path, monkeypatch):
    """`swift sft` with the command line's arguments; returns its last message."""
    (tmp_path / "drift.py").write_text("import drift_peft.integrations.ms_swift\n")
    monkeypatch.chdir(tmp_path)

    def run(*flags, **settings):
        settings = {"drift_prior": str(folder / "prior.safetensors"), **settings}
        for key in {key for key in os.environ if key.startswith("DRIFT_")}:  # of the run before
            monkeypatch.delenv(key)
        command = ["--model", str(folder / "base"), "--model_type", "llama", "--template", "dummy", "--use_hf", "true"]
        command += ["--external_plugins", "drift.py", "--tuner_type", "drift", "--model_kwargs", json.dumps(settings)]
        command += ["--dataset", str(folder / "data.json"), "--split_dataset_ratio", "0", "--torch_dtype", "float32"]
        command += ["--max_steps", "2", "--logging_steps", "1", "--save_steps", "2", "--lora_rank", "4"]
        command += ["--output_dir", "out", "--add_version", "false", "--report_to", "none", "--dataset_num_proc", "1"]
        return sft_main([*command, "--use_cpu", "true", "--dataloader_num_workers", "0", *flags])

    return run


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
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft: did you mean 'drift_alpha'"):
        swift(*resumed, drift_alhpa=0.5)
