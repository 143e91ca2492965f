"""VLMs with text fine-tunes and LoRA adapters of their language models, to transplant from."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft import transplant

FAMILIES = ("qwen2_5_vl", "mllama", "qwen3_5", "gemma3")
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def vlms(tmp_path_factory):
    """Family -> folder with `vlm`, a text fine-tune `expert`, which is the VLM + Δ, and `delta`, of its projections."""
    folders = {}
    for family in FAMILIES:
        folders[family] = folder = tmp_path_factory.mktemp(family)
        vlm = tiny_vlm(family)
        expert, delta = tiny_expert(family, vlm)
        save_layout(vlm, folder / "vlm")
        save_layout(expert, folder / "expert")
        torch.save(delta, folder / "delta")
    return folders


def save_lora(folder, model, seed=0, **settings):
    """A LoRA adapter of a text model as after training, and what it adds: its modules' names -> s·B·A by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**{**LORA, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}


def go(folder, expert="expert", output="out", **options):
    where = {"expert": folder / expert, "base": folder / "vlm", "output": folder / output}
    return transplant(**where | {"progress": False, "overwrite": True} | options)
