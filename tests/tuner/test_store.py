"""store.py: what `guide` steers is saved like what a DriftConfig made: plain LoRA, our settings, our card."""

import copy
import json
import re
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from pairs import IDS, drift, load, train, wrap
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.tuner import store

STOCK = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def guided(folder, family="llama", kind="fp32", **settings):
    model = wrap(load(folder, family, kind), LoraConfig(**LORA))
    return guide(model, folder / "prior.safetensors", **settings)


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_what_guide_steered_is_saved_as_with_a_drift_config(pairs, tmp_path):
    folder, settings = pairs("qwen2_5_vl"), {"drift_alpha": 0.7, "drift_target": "delta"}
    own = drift(folder, target_modules=LORA["target_modules"], init_lora_weights=True, **settings)
    train(wrap(load(folder, "qwen2_5_vl", "nf4"), own)).save_pretrained(tmp_path / "own")
    train(guided(folder, "qwen2_5_vl", "nf4", **settings)).save_pretrained(tmp_path / "guided")
    assert files(tmp_path / "guided") == {*STOCK, "drift_config.json"}
    for name in ("adapter_config.json", "drift_config.json"):
        one, other = (json.loads((tmp_path / way / name).read_text()) for way in ("own", "guided"))
        assert {**one, "target_modules": None} == {**other, "target_modules": None}
    assert other["drift_steps"] == 3 and other["quantization"]["load_in_4bit"]
    cards = [ModelCard.load(tmp_path / way / "README.md") for way in ("own", "guided")]
    assert cards[0].content == cards[1].content and "| guided optimizer steps | 3 |" in cards[1].text


def test_another_library_may_wrap_the_saving_too(pairs, tmp_path):
    """Without saying what it takes."""
    model = guided(pairs("llama"))
    store._with_settings(lambda *args, **kwargs: None, model, tmp_path, selected_adapters=["default"])
    assert files(tmp_path) == {"drift_config.json"}
    store._with_settings(lambda *args, **kwargs: None, model, tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_it_goes_on_by_drift_config_and_by_guide(pairs, tmp_path):
    folder, prior = pairs("llama"), pairs("llama") / "prior.safetensors"
    model = train(guided(folder))
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(folder, "llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
    config = DriftConfig.from_pretrained(tmp_path)
    assert config.r == 4 and config.drift_alpha == 0.3
    model = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
    assert telemetry(train(model, 2))["guided_steps"] == 5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*guidance")
        model = guide(PeftModel.from_pretrained(load(folder, "llama"), tmp_path, is_trainable=True), prior)
        assert telemetry(train(model, 2))["guided_steps"] == 2


def test_only_what_is_steered_has_settings(pairs, tmp_path):
    """Not an adapter beside it, a later model of the same LoraConfig, or what another process writes."""
    folder, lora = pairs("llama"), LoraConfig(**LORA)
    model = get_peft_model(load(folder, "llama"), lora)
    model.add_adapter("plain", LoraConfig(**LORA))
    model.add_adapter("steered", LoraConfig(**LORA))
    for name in ("default", "steered"):
        guide(model, folder / "prior.safetensors", name)
    train(model).save_pretrained(tmp_path / "all")
    assert files(tmp_path / "all") == {*STOCK, "drift_config.json", "plain", "steered"}
    assert files(tmp_path / "all" / "steered") == {*STOCK, "drift_config.json"} - {"README.md"}
    assert files(tmp_path / "all" / "plain") == STOCK - {"README.md"}
    assert "adapter steered: this section" in (tmp_path / "all" / "README.md").read_text()
    model.save_pretrained(tmp_path / "one", selected_adapters=["plain"])
    assert files(tmp_path / "one") == {"README.md", "plain"}
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").rglob("*.json"))
    get_peft_model(load(folder, "llama"), lora).save_pretrained(tmp_path / "later")
    assert files(tmp_path / "later") == STOCK


OTHERS = {
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["o_proj"]),
    "LoHa": LoHaConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]),
    "VeRA": VeraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_types_are_saved_as_ever(pairs, tmp_path, kind):
    """`guide` steers their modules to save, but no DriftConfig describes them."""
    model = get_peft_model(load(pairs("llama"), "llama"), copy.deepcopy(OTHERS[kind]))
    assert telemetry(train(guide(model, pairs("llama") / "prior.safetensors")))["guided_steps"] == 3
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(tmp_path)
    assert files(tmp_path) == STOCK
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert telemetry(train(model, 1))["guided_steps"] == 4


def test_guide_again_saves_the_new_settings(pairs, tmp_path):
    folder = pairs("llama")
    model = guided(folder, drift_alpha=0.5)
    model.save_pretrained(tmp_path)
    guide(copy.deepcopy(model), folder / "prior.safetensors", drift_alpha=0.1).save_pretrained(tmp_path)
    assert DriftConfig.stored(tmp_path)["drift_alpha"] == 0.1
    card = (tmp_path / "README.md").read_text()
    assert re.findall(r"strength ([\d.]+)", card) == ["0.1"]


@pytest.mark.parametrize("kept", [{}, {"save_only_model": True}])
def test_trainer_resumes_with_the_count(pairs, tmp_path, kept):
    """Of the optimizer's state, or of the saved settings."""

    def run(steps, **settings):
        model = guided(pairs("llama"), **settings)
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, **kept
        )
        return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])

    run(2).train()
    resumed = run(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(guidance|was trained with)")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert telemetry(resumed.model)["guided_steps"] == 4
    assert DriftConfig.stored(tmp_path / "checkpoint-4")["drift_steps"] == 4
    with pytest.warns(UserWarning, match=r"checkpoint-2' was trained with drift_alpha=0\.3, which is 0\.1 now"):
        run(4, drift_alpha=0.1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
