"""Random-weight models at real widths, in NF4, and random priors for them: what the benchmarks measure on.

Time and memory do not depend on the values of the weights, so nothing has to be downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from drift_peft.checkpoints import Decoder
from drift_peft.prior.file import FORMAT, write_prior


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def qwen2_5_vl_7b(layers: int = 28, smallest: bool = False) -> Qwen2_5_VLConfig:
    """The configuration of Qwen2.5-VL-7B-Instruct, with fewer layers if asked for (vision layers in proportion).

    `smallest` narrows everything: it shows that a script works, and measures nothing.
    """
    depth = max(1, 32 * layers // 28)
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "use_cache": False,
    }
    vision = {
        "depth": depth,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [i for i in (7, 15, 23, 31) if i < depth] or [0],
    }
    if smallest:
        text |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
        vision |= {"hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 128}
    tokens = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_end_token_id=151653, tie_word_embeddings=False, **tokens
    )


def random_nf4(config: Qwen2_5_VLConfig, device: torch.device, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights: language-model projections in NF4 with double quantization, the rest in bf16.

    Weights are made and quantized one module at a time, so the model never exists in 16 bit.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    for name in Decoder(model).projections:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _random_linear4bit(model.get_submodule(name), device))
    for _, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.fill_(1) if "norm" in type(module).__name__.lower() else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if type(module).__name__.endswith("RotaryEmbedding"):  # its buffers follow from the config
            fresh = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim)
            for name, buffer in fresh.named_buffers():
                setattr(module, name, buffer.to(device))
    model.is_loaded_in_4bit = True
    return model


def _random_linear4bit(module: nn.Linear, device: torch.device) -> bnb.nn.Linear4bit:
    has_bias = module.bias is not None
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(
            module.in_features, module.out_features, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    weight = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    linear.weight = linear.weight.to(device)
    if has_bias:
        linear.bias = nn.Parameter(torch.zeros(module.out_features, dtype=torch.bfloat16, device=device))
    return linear


def random_prior(model: nn.Module, rank: int, seed: int = 0) -> Path:
    """File of a prior of this rank for every projection of the model, S_i ∝ i^-½ with ‖Δ‖ = 0.1·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    tensors, weights = {}, {}
    for name, canonical in Decoder(model).projections.items():
        W = dequantize_module_weight(model.get_submodule(name)).float()
        U, V = (torch.linalg.qr(torch.randn(n, rank, generator=generator).to(W.device)).Q.bfloat16() for n in W.shape)
        S = torch.arange(1, rank + 1, device=W.device) ** -0.5
        S = S * (0.1 * W.norm() / S.norm())
        fingerprint = ((U[:, :8].float().T @ W) * V[:, :8].float().T).sum(-1)
        tensors |= {
            f"{canonical}.U": U.contiguous().cpu(),
            f"{canonical}.S": S.cpu(),
            f"{canonical}.Vh": V.T.contiguous().cpu(),
        }
        weights[canonical] = {
            "shape": list(W.shape),
            "delta_norm": S.norm().item(),
            "base_norm": W.norm().item(),
            "cosine": 0.995,
            "rank": rank,
            "energy": 1.0,
            "fingerprint": fingerprint.tolist(),
        }
    origin = {"id": "random", "revision": None}
    metadata = {"format": FORMAT, "expert": origin, "base": origin, "reference": None, "rank": rank, "seed": seed}
    metadata |= {"dtype": "bfloat16", "modules": ["attn", "mlp"], "not_steered": [], "weights": weights}
    folder = Path(tempfile.mkdtemp())
    write_prior(folder, folder / "random.safetensors", tensors, metadata)
    return folder / "random.safetensors"
