"""The tuner `drift` in `swift sft`. `make test-integrations` brings ms-swift."""

import json

import pytest

from drift_peft import DriftConfig

pytest.importorskip("swift", reason="ms-swift is not installed: make test-integrations installs it beside the rest")
from swift import sft_main


@pytest.fixture
def swift(folder, tmp_path, monkeypatch):
    """`swift sft` with the command line's arguments; returns its last message."""
    (tmp_path / "drift.py").write_text("import drift_peft.integrations.ms_swift\n")
    monkeypatch.chdir(tmp_path)

    def run(*flags, **settings):
        settings = {"drift_prior": str(folder / "prior.safetensors"), **settings}
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


def test_a_wrong_key_is_one_sentence(swift):
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft: did you mean 'drift_alpha'"):
        swift(drift_alhpa=0.5)
