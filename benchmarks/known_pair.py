"""A base and an expert on disk, as wide as Qwen2.5-VL-7B and R1-Distill-Qwen-7B, whose Δ has a known spectrum."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2Config

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 3584, 18944, 28, 4
WEIGHT, DELTA = 0.02, 0.002  # root mean square of the entries of W and Δ; rounding the expert to bf16 adds about 3e-5


def shapes(shrink: int) -> dict[str, tuple[int, int]]:
    """Module of a layer -> [out, in], all widths divided by `shrink`."""
    hidden, intermediate, kv = (n // shrink for n in (HIDDEN, INTERMEDIATE, HIDDEN // HEADS * KV_HEADS))
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    return {f"{part}.{p}_proj": s for part, ps in (("self_attn", attention), ("mlp", mlp)) for p, s in ps.items()}


def spectrum(shape: tuple[int, int], decay: float) -> torch.Tensor:
    """Singular values ∝ i^-decay of a matrix whose entries have the root mean square DELTA."""
    S = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    return S * DELTA * math.sqrt(math.prod(shape)) / S.norm()


def make_base(folder: Path, layers: int, shrink: int) -> None:
    """The VLM's language model, without embeddings; beside it `<folder>-text`, the same files as a text model."""
    text = folder.with_name(f"{folder.name}-text")
    folder.mkdir(parents=True)
    text.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        tensors = {}
        for module, shape in shapes(shrink).items():
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, WEIGHT, generator=generator)
            tensors[f"model.layers.{layer}.{module}.weight"] = weight
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"model.layers.{layer}.{module}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
        save_file(tensors, folder / f"{layer:02}.safetensors")
        (text / f"{layer:02}.safetensors").symlink_to(folder.resolve() / f"{layer:02}.safetensors")
    vlm, llm = _configs(layers, shrink)
    _save_config(folder, vlm)
    _save_config(text, llm)


def make_expert(folder: Path, base: Path, decay: float, layers: int, shrink: int) -> None:
    """base + Δ in each matrix; permuted rows and flipped signs make each Δ another one of the same singular values."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    deltas = {shape: _delta(shape, decay) for shape in set(shapes(shrink).values())}
    for layer in range(layers):
        tensors = load_file(base / f"{layer:02}.safetensors")
        for module, (out, in_) in shapes(shrink).items():
            delta = deltas[out, in_][torch.randperm(out, generator=generator)]
            delta *= torch.randint(0, 2, (in_,), generator=generator) * 2 - 1
            name = f"model.layers.{layer}.{module}.weight"
            tensors[name] = delta.add_(tensors[name]).bfloat16()
        save_file(tensors, folder / f"{layer:02}.safetensors")
    _save_config(folder, _configs(layers, shrink)[1])


def read_delta(module: str, expert: Path, base: Path) -> torch.Tensor:
    """Δ [out, in] of a module of the first layer, in fp32."""
    name = f"model.layers.0.{module}.weight"
    with safe_open(expert / "00.safetensors", "pt") as ours, safe_open(base / "00.safetensors", "pt") as other:
        return ours.get_tensor(name).float().sub_(other.get_tensor(name))


def _delta(shape: tuple[int, int], decay: float) -> torch.Tensor:
    """U diag(S) Vᵀ with that spectrum, the singular vectors taken from discrete cosine transforms."""

    def cosines(n: int) -> torch.Tensor:  # [n, min(shape)], orthonormal columns
        position, frequency = torch.arange(n).double() + 0.5, torch.arange(min(shape)).double()
        Q = torch.outer(position * math.pi / n, frequency).cos_().mul_(math.sqrt(2 / n))
        Q[:, 0] /= math.sqrt(2)
        return Q.float()

    return (cosines(shape[0]) * spectrum(shape, decay).float()) @ cosines(shape[1]).T


def _configs(layers: int, shrink: int) -> tuple[Qwen2_5_VLConfig, Qwen2Config]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text = {
        "hidden_size": HIDDEN // shrink, "intermediate_size": INTERMEDIATE // shrink, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": 152064,
    }  # fmt: skip
    vlm = {**text, "rope_parameters": {**rope, "mrope_section": [16, 24, 24]}}
    return (
        Qwen2_5_VLConfig(text_config=vlm, architectures=["Qwen2_5_VLForConditionalGeneration"]),
        Qwen2Config(**text, rope_parameters=rope, architectures=["Qwen2ForCausalLM"]),
    )


def _save_config(folder: Path, config) -> None:
    """config.json and the index of the files that are there."""
    config.save_pretrained(folder)
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
