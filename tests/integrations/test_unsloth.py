"""Unsloth's models are steered by guide() after get_peft_model. `make test-integrations` brings Unsloth.

Without a GPU, Unsloth trains text models alone, so that FastLanguageModel stands for FastVisionModel here: both make
their adapters with PEFT.
"""

import importlib.util
import os

import pytest

if not importlib.util.find_spec("unsloth"):
    pytest.skip("Unsloth is not installed: make test-integrations", allow_module_level=True)
os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"
from unsloth import FastLanguageModel  # isort: skip  before TRL, which it patches
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from drift_peft import guide, telemetry


def test_lora_is_steered_at_every_step(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for unsloth_compiled_cache
    model, words = FastLanguageModel.from_pretrained(str(folder / "base"), load_in_4bit=False, max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    guide(model, str(folder / "prior.safetensors"), init_lora_weights="drift", drift_start=0.5)
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "per_device_train_batch_size": 2}
    data = Dataset.from_list([{"text": "how many ? 4 + 3 = 7"}] * 4)
    run = SFTTrainer(model, SFTConfig("out", **settings), train_dataset=data, processing_class=words)
    run.train()
    assert run.state.global_step == telemetry(model)["guided_steps"] == 2
