"""What PEFT promises for LoRA holds for a steered adapter: saved and loaded, copied, and by other ways in."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from hub import Hub
from older import known, tells_adapters_apart, transformers_adds_it, transformers_takes_it
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_cases import CASES, equal, every_case, files, quiet, several_adapters, some_cases
from safetensors.torch import load_file
from twin import assert_same_update, pickled, state

from drift_peft import DriftConfig, telemetry

pytestmark = quiet


# Saved and loaded


@every_case
def test_stock_peft_loads_what_is_saved(at, tmp_path):
    model = at.trained()
    assert telemetry(model)["guided_steps"] == 2 and not at.same(model, at.base())
    model.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "drift_config.json",
    }
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert not {field.name for field in dataclasses.fields(DriftConfig)} & set(told) - set(LoraConfig().to_dict())

    loaded = at.stock(tmp_path / "ours")
    assert at.same(loaded, model)
    assert equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    loaded.save_pretrained(tmp_path / "stock")
    assert "drift_config.json" not in files(tmp_path / "stock")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")]
    assert equal(*weights)


@some_cases
def test_adapter_model_bin(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in files(tmp_path) and at.same(at.stock(tmp_path), model)


@tells_adapters_apart
@several_adapters
def test_selected_adapters(at, tmp_path):
    """Though the names of some hold the names of others."""
    model = at.trained()
    for name in ("default2", "efault"):
        model.add_adapter(name, at.config())
    model.set_adapter("default2")
    at.train(model, seed=1)
    second = at.logits(model)
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == []
    keys = load_file(tmp_path / "one" / "adapter_model.safetensors").keys()
    model.save_pretrained(tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir() if path.is_dir()} == {"default2", "efault"}
    for folder in (tmp_path / "all", tmp_path / "all" / "default2", tmp_path / "all" / "efault"):
        assert load_file(folder / "adapter_model.safetensors").keys() == keys
        assert DriftConfig.from_pretrained(folder).drift_steps == {"all": 2, "default2": 2, "efault": 0}[folder.name]

    model.set_adapter("default")
    loaded = at.stock(tmp_path / "all")
    assert at.same(loaded, model)
    assert not loaded.load_adapter(tmp_path / "all" / "default2", "two").missing_keys
    loaded.set_adapter("two")
    assert torch.equal(at.logits(loaded), second)


@every_case
def test_state_dicts(at):
    model, other = at.trained(), at.model()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == [] and at.same(other, model)


@every_case
def test_low_cpu_mem_usage(at, tmp_path):
    """Adapters made on the meta device, and filled from the file; for inference, and to train on."""
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = at.stock(tmp_path, low_cpu_mem_usage=True)
    if "bias" not in at.settings:
        loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    resumed = at.resumed(tmp_path, low_cpu_mem_usage=True)
    for m in (loaded, resumed):
        assert {p.device.type for p in m.parameters()} == {"cpu"} and at.same(m, model)
    start = state(model)
    assert_same_update(at.train(resumed), at.train(model), start)


@every_case
def test_training_goes_on(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    resumed = at.resumed(tmp_path)
    assert at.same(resumed, model)
    start = state(model)
    assert_same_update(at.train(resumed), at.train(model), start)
    assert telemetry(resumed) == pytest.approx(telemetry(model)) and telemetry(resumed)["guided_steps"] == 4


# Other ways in


@some_cases
def test_auto_classes(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.get_base_model()) is type(model.get_base_model()) and at.same(loaded, model)
    if at.family == "llama":
        model = at.train(at.model(task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "causal")
        assert at.same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "causal", dtype=torch.float32), model)


@transformers_takes_it
@every_case
def test_transformers_loads_it(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = at.base()
    loaded.load_adapter(tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert at.same(loaded, model)


@transformers_adds_it
@every_case
def test_transformers_adds_and_saves_it(at, tmp_path):
    model = at.base()
    model.add_adapter(at.config(), "default")
    at.train(model)
    assert telemetry(model)["guided_steps"] == 2
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "drift_config.json"} <= files(tmp_path)
    assert at.same(at.stock(tmp_path), model)
    assert telemetry(at.train(at.resumed(tmp_path), 1))["guided_steps"] == 3


# A Llava that has run holds hooks of transformers that cannot be pickled.
COPIES = [(copy.deepcopy, case) for case in CASES] + [(pickled, case) for case in CASES if CASES[case][0] != "llava"]


@pytest.mark.parametrize(("case", "how"), [known(case, CASES[case][1], how) for how, case in COPIES])
def test_copies(at, how):
    model = at.trained()
    clone, start = how(model), state(model)
    assert at.same(clone, model)
    assert_same_update(at.train(clone), at.train(model), start)
    assert telemetry(clone) == pytest.approx(telemetry(model))


@some_cases
def test_the_hub(at, tmp_path, monkeypatch):
    """push_to_hub uploads the adapter with both its configurations and the filled-in card, and it loads from there."""
    model = at.trained()
    monkeypatch.setattr(
        transformers.utils.hub, "_hf_api", None, raising=False
    )  # it would keep the address of an earlier hub
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path)
        model.push_to_hub("user/adapter", token="hf_x")
        uploaded = hub.files("user/adapter")
        names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "drift_config.json"}
        assert uploaded.keys() == {".gitattributes", *names}
        card = uploaded["README.md"].decode()
        assert "| expert | expert |" in card and "| guided optimizer steps | 2 |" in card
        assert "library_name: peft" in card and "[More Information Needed]" not in card
        assert at.same(at.stock("user/adapter"), model)
        resumed = at.resumed("user/adapter")

        hub.add("user/adapter", {**uploaded, "README.md": (card + "\nMine.\n").encode()})
        at.train(model, 1).push_to_hub("user/adapter", token="hf_x")
        again = hub.files("user/adapter")["README.md"].decode()
        assert again.strip() == (card.replace("steps | 2 |", "steps | 3 |") + "\nMine.").strip()
    assert telemetry(at.train(resumed, 1))["guided_steps"] == 3
