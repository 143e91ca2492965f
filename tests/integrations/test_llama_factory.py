"""`python -m drift_peft.integrations.llama_factory` in the place of LLaMA-Factory's command line, in both its versions.

`make test-integrations` brings LLaMA-Factory. It imports torchaudio, which it needs for audio alone and of which there
is no build for CPUs in the usual place: an empty module stands for it.
"""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from pairs import drift, load
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from drift_peft import DriftConfig, telemetry

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # its ranges exclude what this environment has
if not importlib.util.find_spec("llamafactory"):
    pytest.skip("LLaMA-Factory is not installed: make test-integrations", allow_module_level=True)
if not importlib.util.find_spec("torchaudio"):
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from drift_peft.integrations.llama_factory import adapt, main


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


def test_a_new_adapter_starts_at_a_part_of_delta(llama_factory, recipe):
    output = llama_factory("train", **recipe, drift_start=0.5, learning_rate=1e-9)
    stored = DriftConfig.stored(output)
    assert (stored["init_lora_weights"], stored["drift_start"]) == ("drift", 0.5)
    factors = load_file(output / "adapter_model.safetensors")
    assert all(B.any() for name, B in factors.items() if "lora_B" in name)


def test_a_wrong_key_ends_it_before_anything_is_loaded(llama_factory, recipe):
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft; did you mean drift_alpha\?"):
        llama_factory("train", **recipe, drift_alhpa=0.5)
    with pytest.raises(SystemExit, match=r"must be train, got 'sft': .* llamafactory-cli with finetuning_type: lora"):
        llama_factory("sft", **recipe)


def test_ways_of_training_that_would_not_be_steered_are_refused(llama_factory, recipe, monkeypatch):
    with pytest.raises(ValueError, match=r"^stage: ppo .* nothing would be steered: take sft or dpo"):
        llama_factory("train", **recipe | {"stage": "ppo"})
    run_exp = "llamafactory.train.tuner.run_exp"
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match=r"^Nothing was steered or kept"):
        patched.setattr(run_exp, lambda args, callbacks: None)  # a way that nobody here knows
        llama_factory("train", **recipe)
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")
    with pytest.raises(ValueError, match=r"^USE_MEGATRON_BRIDGE trains without callbacks.*: unset it"):
        llama_factory("train", **recipe)


def test_evaluation_alone_needs_nothing_trainable(llama_factory, recipe, folder, tmp_path):
    get_peft_model(load(folder, "llama"), drift(folder)).save_pretrained(tmp_path / "adapter")
    recipe |= {"do_train": False, "do_eval": True, "eval_dataset": "sums"}
    recipe |= {"max_steps": -1, "adapter_name_or_path": str(tmp_path / "adapter")}
    output = llama_factory("train", **recipe)
    assert "eval_loss" in json.loads((output / "all_results.json").read_text())


def test_it_reads_a_keep_sets_samples_as_the_guide_says(recipe, tmp_path):
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import get_train_args

    guide = Path(__file__).parents[2].joinpath("docs/guides/keep-sets.md").read_text(encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(re.search(r"```json\n(.*?)```", guide, re.S)[1])
    (tmp_path / "folder" / "samples_images").mkdir(parents=True)
    picture = "samples_images/0.png"
    (tmp_path / "folder" / picture).touch()
    turns = [{"role": "user", "content": "<image>how many ?"}, {"role": "assistant", "content": "7"}]
    (tmp_path / "folder" / "samples.jsonl").write_text(json.dumps({"messages": turns, "images": [picture]}))
    own = {key: value for key, value in recipe.items() if not key.startswith("drift_")}
    own |= {"media_dir": str(tmp_path / "folder"), "output_dir": str(tmp_path / "out")}
    (told,) = get_dataset_list(["kept"], str(tmp_path))
    (sample,) = _load_single_dataset(told, *get_train_args(own)[:3])
    assert (sample["_prompt"], sample["_response"]) == ([turns[0]], [turns[1]])
    assert sample["_images"] == [str(tmp_path / "folder" / picture)]


@pytest.fixture
def v1(folder, tmp_path, monkeypatch):
    """The recipe of the new trainer."""
    monkeypatch.setenv("USE_V1", "1")
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"sums": {"path": str(tmp_path / "v1.json"), "source": "local"}})
    )
    chosen, rejected = (
        [
            {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}
            for role, text, weight in [("user", "how many ?", 0.0), ("assistant", answer, 1.0)]
        ]
        for answer in ("4 + 3 = 7", "4 + 3 = 8")
    )
    pair = {"chosen_messages": chosen, "rejected_messages": rejected}
    (tmp_path / "v1.json").write_text(json.dumps([{"messages": chosen}] * 8))
    (tmp_path / "pairs.json").write_text(json.dumps([pair] * 8))
    prior = str(folder / "prior.safetensors")
    peft = {"name": "drift", "r": 4, "lora_alpha": 8, "target_modules": "all", "drift_prior": prior}
    recipe = {"model": str(folder / "base"), "template": "qwen3_nothink", "train_dataset": str(tmp_path / "data.yaml")}
    recipe |= {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 1, "cutoff_len": 64, "bf16": False}
    return recipe | {"peft_config": peft}


def test_the_plugin_of_v1_is_steered_at_every_step(llama_factory, v1):
    saved = DriftConfig.from_pretrained(llama_factory("sft", **v1))
    assert (saved.r, saved.drift_steps) == (4, 2)


def test_the_reward_model_of_v1_is_steered_and_its_head_saved(llama_factory, v1, tmp_path):
    (tmp_path / "pairs.json").replace(tmp_path / "v1.json")
    output = llama_factory("rm", **v1)
    assert DriftConfig.from_pretrained(output).drift_steps == 2
    assert "base_model.model.score.weight" in load_file(output / "adapter_model.safetensors")


def test_dpo_of_v1_is_steered_where_there_is_one(llama_factory, v1, tmp_path):
    (tmp_path / "pairs.json").replace(tmp_path / "v1.json")
    from llamafactory.v1.trainers import dpo_trainer

    if hasattr(dpo_trainer, "run_dpo"):
        assert DriftConfig.from_pretrained(llama_factory("dpo", **v1)).drift_steps == 2
    else:  # as in 0.9.5
        with pytest.raises(SystemExit, match=r"must be train or sft or rm, got 'dpo': .* with name: lora"):
            llama_factory("dpo", **v1)


def test_the_block_of_v1_may_be_written_as_llama_factorys_own(folder, tmp_path):
    peft = {"name": "drift", "r": 4, "drift_prior": str(folder / "prior.safetensors")}
    model = adapt(load(folder, "llama"), peft | {"target_modules": "q_proj", "export_dir": "x", "export_size": 5}, True)
    assert model.peft_config["default"].target_modules == {"q_proj"}
    model.save_pretrained(tmp_path / "ours")
    stock = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "stock")
    for name in ("ours", "stock"):
        told = peft | {"adapter_name_or_path": [str(tmp_path / name)]}
        assert telemetry(adapt(load(folder, "llama"), told, True))["guided_steps"] == 0
        assert not any(p.requires_grad for p in adapt(load(folder, "llama"), told).parameters())
    with pytest.raises(ValueError, match=r"^adapter_name_or_path names 2 adapters: merge all but the last"):
        adapt(load(folder, "llama"), peft | {"adapter_name_or_path": ["a", "b"]}, True)
