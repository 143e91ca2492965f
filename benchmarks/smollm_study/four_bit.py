"""What NF4 takes from a real language model, beside what training gave it."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from drift_peft.demo.evaluate import ask

from .abilities import abilities
from .make import make_processor
from .precision import compute_dtype, nf4
from .world import exams, is_right

PROJECTIONS = "_proj.weight"


def in_four_bits(folder: Path, device: torch.device, size: int, console: Console) -> None:
    """The ancestor and the expert, in 16 bits and in NF4: abilities, and `size` calculations in text.

    Beside them, of the projections: the noise of quantization ‖dequantize(quantize(W)) − W‖/‖W‖, Δ's share ‖Δ‖/‖W‖,
    and the largest weight of a matrix in its standard deviations.
    """
    table = Table(title=f"{size} calculations in text, and what is left of the language model")
    for head in ("model", "stored in", "right", "perplexity", "KL to the ancestor in 16 bits"):
        table.add_column(head)
    forms = {"16 bits": {}, "NF4": {"quantization_config": nf4(device)}}
    processor, samples = make_processor(folder), exams("test", 0, size)["text reasoning"]
    for name in ("base", "expert"):
        for stored, settings in forms.items():
            place = {"dtype": compute_dtype(device), "device_map": {"": device}}
            model = AutoModelForCausalLM.from_pretrained(folder / name, **place, **settings)
            texts = ask(model, processor, samples, batch_size=50)
            right = sum(map(is_right, samples, texts)) / size
            left = abilities(model, processor.tokenizer, folder / "base")
            cells = f"{100 * right:.0f}", f"{left['perplexity']:.2f}", f"{left['kl']:.3f}"
            table.add_row({"base": "ancestor", "expert": "expert"}[name], stored, *cells)
    console.print(table)
    console.print(weights(folder, device))


@torch.no_grad()
def weights(folder: Path, device: torch.device) -> Table:
    models = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16, device_map={"": device})
        for name in ("base", "expert")
    )
    base, expert = (dict(model.named_parameters()) for model in models)
    sums: dict[str, torch.Tensor] = {}
    largest: dict[str, float] = {}
    for name, W in base.items():
        if not name.endswith(PROJECTIONS):
            continue
        kind = name.split(".")[-2]
        noise = dequantize_4bit(*quantize_4bit(W, quant_type="nf4")).float() - W.float()
        delta = expert[name].float() - W.float()
        along = (noise * delta).sum() ** 2 / delta.square().sum()  # ‖the part of the noise that is along Δ‖²
        found = torch.stack([W.float().square().sum(), noise.square().sum(), delta.square().sum(), along])
        sums[kind] = sums.get(kind, 0) + found
        largest[kind] = max(largest.get(kind, 0.0), (W.float().abs().max() / W.float().std()).item())
    sums["all"], largest["all"] = sum(sums.values()), max(largest.values())
    table = Table(title="NF4's noise and Δ, expert − ancestor")
    for head in ("weights", "noise / ‖W‖", "‖Δ‖ / ‖W‖", "noise along Δ / ‖Δ‖", "largest, in std"):
        table.add_column(head)
    for kind, (whole, noise, delta, along) in sums.items():
        shares = (noise / whole, delta / whole, along / delta)
        table.add_row(kind, *(f"{share.sqrt().item():.4f}" for share in shares), f"{largest[kind]:.0f}")
    return table
