"""Adapters as vLLM serves them. That it does is `benchmarks/vllm_names.py`, which needs vLLM."""

import json
import shutil

import pytest
import torch
from older import saves_biases
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import rename_keys, tiny_vlm

from drift_peft.checkpoints import export_for_vllm, how_to_serve, language_model_targets

RECORDED = ("base_model_name_or_path", "revision")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family, settings -> adapter on a tiny base whose config.json is there."""

    def save(family, **settings):
        folder, model = tmp_path_factory.mktemp(family), tiny_vlm(family)
        model.config.save_pretrained(folder / "base")
        settings = {"r": 2, "target_modules": language_model_targets(model), **settings}
        model = get_peft_model(model, LoraConfig(base_model_name_or_path=str(folder / "base"), **settings))
        model.save_pretrained(folder / "adapter")
        return folder / "adapter"

    return save


@pytest.mark.parametrize("family, renamed", [("qwen2_5_vl", 0), ("lfm2_vl", 2)])
def test_the_names_are_those_of_vllm(saved, tmp_path, family, renamed):
    adapter = saved(family)
    report = export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    assert {name.replace(".conv.", ".short_conv.") for name in before} == after.keys()
    assert all(torch.equal(t, after[name.replace(".conv.", ".short_conv.")]) for name, t in before.items())
    assert (report.modules, report.renamed, report.max_lora_rank) == (len(before) // 2, renamed, 8)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    before = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert {*config["target_modules"]} == ({name.split(".")[-3] for name in after} if renamed else {*before})


def test_the_config_names_the_base_that_was_given(saved, tmp_path):
    adapter = saved("llava", revision="v1")
    moved = shutil.copytree(adapter.parent / "base", tmp_path / "moved")
    export_for_vllm(adapter, tmp_path / "out", moved)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert [config[key] for key in RECORDED] == [str(moved), None]


def test_a_config_without_what_peft_takes_for_granted(saved, tmp_path):
    adapter = saved("llava", r=8, revision="v1")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("r", "lora_alpha")}))
    assert export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base").max_lora_rank == 8
    after = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert after.keys() == config.keys() and [key for key in after if after[key] != config[key]] == [*RECORDED]


def test_what_was_asked_for_and_is_not_there_is_not_asked_of_vllm(saved, tmp_path):
    """It refuses an adapter whose config names biases or saved modules, whatever its file holds."""
    adapter = saved("llava", bias="lora_only", modules_to_save=["no_module"])  # of layers that have no biases
    export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"], config["trainable_token_indices"]) == ("none", None, None)


@pytest.mark.parametrize(
    "family, older", [("llava", "language_model.model."), ("qwen2_5_vl", "model."), ("llava", "language_model.")]
)
def test_names_of_another_version_of_transformers(saved, tmp_path, family, older):
    adapter = saved(family, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    own = load_file(adapter / "adapter_model.safetensors").keys()
    rename_keys(adapter, lambda key: key.replace("model.language_model.", older, 1))
    assert own.isdisjoint(load_file(adapter / "adapter_model.safetensors"))
    report = export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (after.keys(), report.modules, report.renamed) == (own, len(own) // 2, len(own) // 2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {*config["target_modules"]} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("rank, flag", [(1, 1), (9, 16), (257, 320), (321, 512), (512, 512), (513, None), (None, None)])
def test_cards_name_a_rank_that_vllm_takes(rank, flag):
    text = how_to_serve("org/vlm", None, "adapter", rank)
    assert ("drift-peft export" in text) == (flag is not None) == (f"--max-lora-rank {flag} " in text)
    assert "vllm serve merged" in text


@pytest.mark.parametrize(
    "family, settings, said",
    [
        ("llava_onevision", {}, "adapter on a llava_onevision model: merge"),
        ("llava", {"use_dora": True}, "more than LoRA factors of .*use_dora"),
        pytest.param("qwen2_5_vl", {"bias": "lora_only"}, "more than LoRA factors of .*bias", marks=saves_biases),
        ("llava", {"modules_to_save": ["lm_head"]}, "more than LoRA factors of .*lm_head.*modules_to_save"),
        ("llava", {"target_modules": ["fc1"]}, "adapts .*fc1.*the language model's layers alone"),
        ("llava", {"rank_pattern": {"q_proj": 4}}, "has a rank_pattern"),
        ("llava", {"r": 513, "target_modules": r".*language_model.layers.0.self_attn.q_proj"}, "rank 513.* 512 at"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(saved, tmp_path, family, settings, said):
    adapter = saved(family, **settings)
    with pytest.raises(ValueError, match=said):
        export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base")
    assert not [*tmp_path.iterdir()]


def test_another_base_is_refused(saved, tmp_path):
    adapter, other = saved("qwen2_5_vl"), saved("smolvlm").parent / "base"
    with pytest.raises(
        ValueError, match=r"adapts model\.language_model\.layers\S+, and .*base has no module of this name"
    ):
        export_for_vllm(adapter, tmp_path / "out", other)
    assert not [*tmp_path.iterdir()]


def test_an_adapter_without_modules_is_refused(saved, tmp_path):
    adapter = saved("qwen2_5_vl")
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no weights"):
        export_for_vllm(adapter, tmp_path / "out", adapter.parent / "base")
