"""A prior file with the statistics that a real pair could have, at narrow widths."""

import math
import re

import torch

from drift_peft import ReasoningPrior
from drift_peft.prior.file import FORMAT, partial_output, write_prior

HIDDEN, KV, INTERMEDIATE = 128, 96, 256
PROJECTIONS = {  # -> shape, size of Δ beside the others'
    "self_attn.q_proj": ((HIDDEN, HIDDEN), 1.15),
    "self_attn.k_proj": ((KV, HIDDEN), 1.0),
    "self_attn.v_proj": ((KV, HIDDEN), 0.8),
    "self_attn.o_proj": ((HIDDEN, HIDDEN), 1.05),
    "mlp.gate_proj": ((INTERMEDIATE, HIDDEN), 1.0),
    "mlp.up_proj": ((INTERMEDIATE, HIDDEN), 0.95),
    "mlp.down_proj": ((HIDDEN, INTERMEDIATE), 0.9),
}
VECTORS = {"input_layernorm.weight": HIDDEN, "post_attention_layernorm.weight": HIDDEN, "self_attn.q_proj.bias": HIDDEN}
CLOSE_PAIR, BETWEEN, FAR_PAIR = 0.17, 0.5, 0.7  # ‖Δ‖/‖W‖ about the middle of the model


def sample_prior(path, layers=28, rank=64, size=FAR_PAIR, extras=False, only="", **header):
    """Write a prior whose singular values fall as a power of their index, and load it.

    Args:
        rank: of every matrix, or "mixed": as `energy=…` chooses it, another one for each matrix.
        size: ‖Δ‖/‖W_base‖ in the middle of the model; it is more at both ends, and ‖W_expert‖ = ‖W_base‖ throughout.
        extras: also norms, biases, the embedding, the head and the final norm.
        only: regular expression of the weights to keep.
        header: what to change in the header.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, {}

    def add(name, shape, relative):
        if not re.search(only, name):
            return
        base_norm = math.sqrt(math.prod(shape)) * 0.9
        delta_norm = relative * base_norm
        stats = {"shape": list(shape), "delta_norm": delta_norm, "base_norm": base_norm, "cosine": 1 - relative**2 / 2}
        if len(shape) == 1:
            tensors[f"{name}.delta"] = torch.full(shape, delta_norm / math.sqrt(*shape))
            weights[name] = {**stats, "energy": 1.0}
            return
        k = torch.randint(9, 65, (), generator=generator).item() if rank == "mixed" else min(rank, *shape)
        power = (0.55 if "attn" in name else 0.35) + 0.04 * torch.randn((), generator=generator).item()
        S = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
        S = delta_norm * S / S.norm()
        tensors[f"{name}.U"], tensors[f"{name}.Vh"] = (
            torch.eye(shape[0], k).bfloat16(),
            torch.eye(k, shape[1]).bfloat16(),
        )
        tensors[f"{name}.S"] = S[:k].float()
        energy = S[:k].square().sum().item() / delta_norm**2
        weights[name] = {**stats, "rank": k, "energy": energy, "fingerprint": [1.0] * min(8, k)}

    for layer in range(layers):
        place = layer / max(1, layers - 1)  # 0 … 1
        bend = 1 + 0.25 * (2 * place - 1) ** 2
        for name, (shape, factor) in PROJECTIONS.items():
            noise = 1 + 0.03 * torch.randn((), generator=generator).item()
            add(f"layers.{layer}.{name}.weight", shape, size * factor * bend * noise)
        for name, length in VECTORS.items() if extras else ():
            add(f"layers.{layer}.{name}", (length,), 0.2 * size * bend)
    if extras:
        add("embed_tokens.weight", (512, HIDDEN), 0.3 * size)
        add("norm.weight", (HIDDEN,), 0.1 * size)
        add("lm_head.weight", (512, HIDDEN), 0.4 * size)
    metadata = {
        "format": FORMAT,
        "expert": {
            "id": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            "revision": "916b56a44061fd5cd7d6a8fb632557ed4f724f60",
        },
        "base": {"id": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": None},
        "reference": None,
        "rank": None if rank == "mixed" else rank,
        "dtype": "bfloat16",
        "seed": 0,
        "modules": ["attn", "mlp"],
        "not_steered": [],
        "weights": weights,
    }
    with partial_output(path, overwrite=True) as folder:
        write_prior(folder, path, tensors, metadata | header)
    return ReasoningPrior.load(path)
