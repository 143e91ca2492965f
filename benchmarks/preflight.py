"""Does `drift-peft preflight` tell what training takes? Its estimate beside the peak of a real step, Qwen2.5-VL-7B.

python benchmarks/preflight.py [--tokens 1024 4096] [--image 512] [--smallest]

The real configuration with random weights, trained as recipes/sft_vlm.py trains: NF4, r=16 in fp32, autocast to bf16,
gradient checkpointing, TRL's chunked loss, paged 8-bit AdamW. Measured is the peak of PyTorch's allocator, so the CUDA
context and the optimizer's state, which is paged, are no part of the estimate here. Without CUDA nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from fits_24gb import batch
from models import device_name, qwen2_5_vl_7b, random_nf4, random_prior

from drift_peft import DriftConfig
from drift_peft.preflight import Memory, Settings

MOMENTARY = (  # parts that are there at some moment of a step alone
    "activations kept in all layers",
    "other activations at that moment",
    "vision tower's activations",
    "guidance, 32 bits",
)


def measured(config, tokens: list[int], image: int, device: torch.device) -> tuple[list[float], float, float]:
    """GB at the peak of training with so many tokens, between steps, and of the CUDA context."""
    model = random_nf4(config, device)
    prior = random_prior(model, rank=64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        model = get_peft_model(model, DriftConfig(prior=prior, r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    from trl.trainer.utils import add_fused_lm_head  # not in the oldest versions

    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    peaks = []
    for number in tokens:
        inputs = batch(config, number, image, device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):  # steps of two micro-batches each: only from the second on do gradients lie there
            for _ in range(2):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(**inputs, fused_lm_head=True).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated(device) / 1e9)
    free, total = torch.cuda.mem_get_info(device)
    context = (total - free - torch.cuda.memory_reserved(device)) / 1e9  # of all processes on this device
    return peaks, torch.cuda.memory_allocated(device) / 1e9, context


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--image", type=int, default=512)
    parser.add_argument("--smallest", action="store_true", help="narrow layers, to see that the script works")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = qwen2_5_vl_7b(2 if args.smallest else 28, args.smallest)
    memory = Memory(config, "Qwen2.5-VL-7B")
    pixels = {"max_pixels": args.image**2}
    lean = Settings("", r=16, per_device_train_batch_size=1, optim="paged_adamw_8bit", processor_kwargs=pixels)
    apart = "CUDA context", f"optimizer ({lean.optim})"
    at_rest = memory.estimate(lean).parts.keys() - {*apart, "its gradients, 32 bits"} - {*MOMENTARY}
    rows = []
    for tokens in args.tokens:
        now = memory.estimate(Settings(**{**vars(lean), "max_tokens": tokens}))
        allocated = sum(size for part, size in now.parts.items() if part not in apart) / 1e9
        rows.append({"tokens": tokens, "total_gb": now.bytes / 1e9, "estimated_gb": allocated, "moment": now.moment})
    rest = {
        "estimated_gb": sum(size for part, size in now.parts.items() if part in at_rest) / 1e9,
        "estimated_context_gb": now.parts["CUDA context"] / 1e9,
    }
    if device.type == "cuda":
        peaks, rest["measured_gb"], rest["measured_context_gb"] = measured(config, args.tokens, args.image, device)
        for row, peak in zip(rows, peaks, strict=True):
            row |= {"measured_gb": peak, "error": row["estimated_gb"] / peak - 1}
    table = Table("tokens", "estimated GB", "measured GB", "error", title=f"training's peak, {device_name(device)}")
    for row in rows:
        found = (f"{row['measured_gb']:.2f}", f"{row['error']:+.1%}") if "error" in row else ("not measured", "–")
        table.add_row(str(row["tokens"]), f"{row['estimated_gb']:.2f}", *found)
    console = Console(width=100)
    console.print(table)
    if device.type == "cuda":
        console.print(
            f"between steps: estimated {rest['estimated_gb']:.2f} GB, measured {rest['measured_gb']:.2f} GB; CUDA "
            f"context: estimated {rest['estimated_context_gb']:.2f} GB, measured {rest['measured_context_gb']:.2f} GB"
        )
    else:
        console.print("not measured: no CUDA device")
    result = {"benchmark": "preflight", "device": device_name(device), "smallest": args.smallest, "rows": rows}
    print(json.dumps({**result, "between_steps": rest}))


if __name__ == "__main__":
    main()
