"""Does the real thing fit a consumer card? Qwen2.5-VL-7B in NF4, steered LoRA, under a hard cap of GPU memory.

python benchmarks/fits_24gb.py [--cap 24] [--image 512] [--tokens 2048] [--steps 10]

The real configuration with random weights, vision tower and projector in bf16; r=16 on all language-model projections,
prior of rank 64, one image and a text up to `--tokens` in all, gradient checkpointing, paged 8-bit AdamW. Trains, then
merges; prints peak memory by part and seconds per step. An allocation beyond the cap fails, as it would on the card.
Without CUDA it prints the computed sizes by part, and a run on the CPU with one layer and few tokens shows that the
script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from models import device_name, qwen2_5_vl_7b, random_nf4, random_prior, synchronize
from transformers import Qwen2_5_VLForConditionalGeneration

from drift_peft import DriftConfig, telemetry
from drift_peft.checkpoints import canonical_name, module_kind
from drift_peft.tuner.steered import steered_of


def batch(config, tokens: int, image: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One sample: an image of image x image pixels and text, `tokens` in all."""
    patch = config.vision_config.patch_size
    side = round(image / (2 * patch)) * 2  # patches; pairs of them merge into one token
    image_tokens = side * side // 4
    if image_tokens + 2 > tokens:
        raise SystemExit(f"an image of {image} pixels takes {image_tokens} tokens: --tokens must be larger")
    ids = torch.randint(1000, 100000, (1, tokens))
    ids[0, 0], ids[0, 1 + image_tokens] = config.vision_start_token_id, config.vision_end_token_id
    ids[0, 1 : 1 + image_tokens] = config.image_token_id
    types = (ids == config.image_token_id).long()
    labels = ids.masked_fill(types.bool(), -100)
    pixels = torch.randn(side * side, 3 * 2 * patch * patch, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "mm_token_type_ids": types}
    inputs["image_grid_thw"] = torch.tensor([[1, side, side]])
    return {name: value.to(device) for name, value in inputs.items()}


def sizes(model) -> dict[str, float]:
    """GB of the parameters by part."""
    parts = {"language model, NF4": 0, "embedding and head, bf16": 0, "vision tower, bf16": 0, "adapter, fp32": 0}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "adapter, fp32"
        elif "visual" in name:
            part = "vision tower, bf16"
        elif "embed_tokens" in name or "lm_head" in name:
            part = "embedding and head, bf16"
        else:
            part = "language model, NF4"
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                parts[part] += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        parts[part] += parameter.nbytes
    parts["steering factors, bf16"] = sum(t.nbytes for s in steered_of(model) for t in s.prior.values())
    return {part: size / 1e9 for part, size in parts.items()}


def run(layers: int, tokens: int, image: int, steps: int, device: torch.device, smallest: bool) -> dict:
    cuda = device.type == "cuda"
    config = qwen2_5_vl_7b(layers, smallest)
    model = random_nf4(config, device)
    prior = random_prior(model, rank=64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        model = get_peft_model(model, DriftConfig(prior=prior, r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(adapter, lr=1e-4) if cuda else torch.optim.AdamW(adapter, lr=1e-4)
    inputs = batch(config, tokens, image, device)
    seconds, losses, peaks = [], [], {}
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    state = telemetry(model)
    parts = sizes(model)
    if cuda:
        peaks["training"] = torch.cuda.max_memory_allocated(device) / 1e9
        peaks["training, reserved"] = torch.cuda.max_memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    model.merge_and_unload()
    synchronize(device)
    if cuda:
        peaks["merge"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {
        "parts_gb": parts,
        "peaks_gb": peaks,
        "seconds_per_step": statistics.median(seconds),
        "merge_s": time.perf_counter() - start,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "guided_steps": state["guided_steps"],
        "absorbed": state["absorbed"],
    }


def computed_sizes() -> dict[str, float]:
    """GB by part for all 28 layers, from the configuration alone."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_7b())
    counts = {
        "language model, NF4": 0.0,
        "other weights, bf16": 0.0,
        "adapter, fp32": 0.0,
        "steering factors, bf16": 0.0,
    }
    for name, p in model.named_parameters():
        if module_kind(canonical_name(name) or "") in ("attn", "mlp"):
            counts["language model, NF4"] += p.numel() * (0.5 + 1 / 64 + 4 / (64 * 256))
            counts["adapter, fp32"] += 4 * 16 * sum(p.shape)
            counts["steering factors, bf16"] += 2 * 16 * sum(p.shape)
        else:
            counts["other weights, bf16"] += 2 * p.numel()
    return {part: size / 1e9 for part, size in counts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cap", type=float, default=24, help="GB that the process may take")
    parser.add_argument("--image", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smallest", action="store_true", help="narrow layers, to see that the script works")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    console = Console(width=100)
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap / total))
        result = run(28, args.tokens, args.image, args.steps, device, args.smallest)
        title = (
            f"Qwen2.5-VL-7B sizes, {args.tokens} tokens, image {args.image}, cap {args.cap} GB, {device_name(device)}"
        )
    else:
        result = run(1, 64, 56, 2, device, args.smallest)
        result["computed_28_layers_gb"] = computed_sizes()
        title = "no CUDA device: one layer and 64 tokens on the CPU, to show that the script works"
    table = Table("part", "GB", title=title)
    for part, size in [*result["parts_gb"].items(), *((f"peak, {k}", v) for k, v in result["peaks_gb"].items())]:
        table.add_row(part, f"{size:.2f}")
    for part, size in result.get("computed_28_layers_gb", {}).items():
        table.add_row(f"computed for 28 layers: {part}", f"{size:.2f}")
    console.print(table)
    console.print(
        f"{result['seconds_per_step']:.3f} s per step, merge {result['merge_s']:.1f} s, {result['guided_steps']} "
        f"guided steps, loss {result['first_loss']:.2f} -> {result['last_loss']:.2f}"
    )
    cap = args.cap if cuda else None
    print(json.dumps({"benchmark": "fits_24gb", "device": device_name(device), "cap_gb": cap, **result}))


if __name__ == "__main__":
    main()
