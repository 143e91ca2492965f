"""A steered adapter, its base and its prior as files, for what they may be damaged to."""

import torch
from dense_prior import dense_prior
from peft import LoraConfig, get_peft_model
from tiny import save_layout, tiny_llm

from drift_peft import DriftConfig

Q = "model.layers.0.self_attn.q_proj.weight"


def save_steered(folder):
    """base/ in shards, adapter/ of it, p.safetensors, and steered/ with the settings alone; returns the folder."""
    model = tiny_llm("llava")
    save_layout(model, folder / "base", max_shard_size="60KB")
    generator = torch.Generator().manual_seed(0)
    weights = {Q.removeprefix("model."): [torch.randn(6, 5, generator=generator) for _ in range(2)]}
    weights["norm.weight"] = [torch.randn(5, generator=generator) for _ in range(2)]
    dense_prior(folder / "p.safetensors", weights, rank=2)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")
    steered = DriftConfig(prior=folder / "p.safetensors", drift_modules=["attn"])
    steered.quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    steered.save_pretrained(folder / "steered")
    return folder
