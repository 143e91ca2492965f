"""`python -m drift_peft.integrations.llama_factory` in the place of LLaMA-Factory's command line, in both its versions.

`make test-integrations` brings LLaMA-Factory. It imports torchaudio, which it needs for audio alone and of which there
is no build for CPUs in the usual place: an empty module stands for it.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types

import pytest
import yaml

from drift_peft import DriftConfig

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # its ranges exclude what this environment has
if not importlib.util.find_spec("llamafactory"):
    pytest.skip("LLaMA-Factory is not installed: make test-integrations", allow_module_level=True)
if not importlib.util.find_spec("torchaudio"):
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from drift_peft.integrations.llama_factory import main


@pytest.fixture
def llama_factory(folder, tmp_path, monkeypatch):
    """The command with its settings in a file."""
    told = {"sums": {"file_name": str(folder / "data.json"), "formatting": "sharegpt"}}
    told["sums"] |= {"columns": {"messages": "messages"}, "tags": {"role_tag": "role", "content_tag": "content"}}
    told["sums"]["tags"] |= {"user_tag": "user", "assistant_tag": "assistant"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(told))

    def run(command, **settings):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **settings}))
        monkeypatch.setattr(sys, "argv", ["llama_factory", command, str(tmp_path / "recipe.yaml")])
        main()
        return tmp_path / "out"

    return run


@pytest.fixture
def recipe(folder, tmp_path):
    """Of the released trainer."""
    return {
        "model_name_or_path": str(folder / "base"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "q_proj,up_proj",
        "dataset_dir": str(tmp_path),
        "dataset": "sums",
        "template": "empty",
        "disable_gradient_checkpointing": True,  # its way is not that of transformers 5.23
        "cutoff_len": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "drift_prior": str(folder / "prior.safetensors"),
    }


def test_lora_is_steered_at_every_step(llama_factory, recipe):
    output = llama_factory("train", **recipe, drift_alpha=0.5)
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["drift/guided_steps"] for entry in logs[:2]] == [1, 2]
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4


def test_a_wrong_key_ends_it_before_anything_is_loaded(llama_factory, recipe):
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft: did you mean 'drift_alpha'"):
        llama_factory("train", **recipe, drift_alhpa=0.5)
    with pytest.raises(SystemExit, match="must be train, got 'sft'"):
        llama_factory("sft", **recipe)


def test_the_plugin_of_v1_is_steered_at_every_step(llama_factory, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"sums": {"path": str(tmp_path / "v1.json"), "source": "local"}})
    )
    turns = [("user", "how many ?", 0.0), ("assistant", "4 + 3 = 7", 1.0)]
    sample = [
        {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}
        for role, text, weight in turns
    ]
    (tmp_path / "v1.json").write_text(json.dumps([{"messages": sample}] * 8))
    prior = str(folder / "prior.safetensors")
    peft = {"name": "drift", "r": 4, "lora_alpha": 8, "target_modules": "all", "drift_prior": prior}
    recipe = {"model": str(folder / "base"), "template": "qwen3_nothink", "train_dataset": str(tmp_path / "data.yaml")}
    recipe |= {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 1, "cutoff_len": 64, "bf16": False}
    output = llama_factory("sft", peft_config=peft, **recipe)
    saved = DriftConfig.from_pretrained(output)
    assert (saved.r, saved.drift_steps) == (4, 2)
