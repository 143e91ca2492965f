"""Base, expert and a reference near both, of several families, and what merge_baseline makes of them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_layout, tiny_expert, tiny_llm, tiny_vlm

from drift_peft import merge_baseline
from drift_peft.checkpoints.naming import canonical_name

FAMILIES = ("qwen2_5_vl", "llava_next", "idefics2", "mllama", "llama")
CROSS = {"mllama": (1, 3)}
Q = "layers.0.self_attn.q_proj.weight"


def disturb(model, seed, share=0.3):
    """Move every weight, norm and bias of the text model's layers, and its final norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.get_decoder().named_parameters():
        if "embed" not in name:
            size = share * (parameter.std() if parameter.dim() == 2 else 0.1)
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def save_trio(folder, family, dtype=torch.float32, shard="20KB", **changes):
    """Write base, expert, and reference, which is near both, but nearer to each than they are to one another."""
    if family == "llama":
        models = [tiny_llm("llava", **changes) for _ in range(3)]
    else:
        vlm = tiny_vlm(family)
        models = [vlm, tiny_expert(family, vlm)[0], tiny_expert(family, vlm, seed=2)[0]]
    for seed, (role, model) in enumerate(zip(("base", "expert", "reference"), models, strict=True)):
        save_layout(disturb(model, seed).to(dtype), folder / role, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def trios(tmp_path_factory):
    return {family: save_trio(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def trio(trios, tmp_path):
    """A small one of its own, to spoil."""
    return shutil.copytree(trios["llama"], tmp_path, dirs_exist_ok=True)


def merge(folder, method="task_arithmetic", output="merged", **options):
    where = {"expert": folder / "expert", "base": folder / "base", "output": folder / output}
    return merge_baseline(method, **where | options, overwrite=True, progress=False)


def tensors(folder):
    """Raw key -> tensor."""
    return {key: tensor for shard in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(shard).items()}


def text_weights(folder, cross=()):
    """Canonical name -> tensor, of what is merged: all but embedding and head."""
    names = {canonical_name(key, cross): tensor for key, tensor in tensors(folder).items()}
    return {name: tensor for name, tensor in names.items() if name and name.startswith(("layers.", "norm."))}
