"""Tiny bases and stock LoRA adapters to merge by merge_adapter, what spoils them, and what comes out."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import rename_keys, save_layout, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from drift_peft import language_model_targets, merge_adapter

IDS = torch.arange(7, 27).reshape(2, 10)
LAYOUTS = {"hub": "5GB", "memory": "5GB", "sharded": "20KB"}  # layout -> largest shard


def tiny(family):
    return tiny_llm("llava") if family == "llama" else tiny_vlm(family)


def save_base(folder, family="llama", layout="hub", dtype=torch.float32):
    save_layout(tiny(family).to(dtype), folder, layout.replace("sharded", "hub"), LAYOUTS[layout])
    return folder


def load(folder, family="llama", **options):
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    return auto.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def save_adapter(folder, family="llama", std=0.05, model=None, **settings):
    """A stock LoRA adapter whose lora_B is random instead of zero, on the model's own in-memory names."""
    model = model or tiny(family)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": language_model_targets(model), **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator) if std else parameter.data.zero_()
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge(tmp_path, **options):
    return merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False, **options)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    save_base(folder / "base")
    save_adapter(folder / "adapter")
    return folder


@pytest.fixture
def pair(template, tmp_path):
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def edit_config(folder, name="adapter_config.json", **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def rename_module(old, new):
    return lambda p: rename_keys(p / "adapter", lambda key: key.replace(old, new))


def lora(**settings):
    return lambda p: save_adapter(p / "adapter", **settings)
