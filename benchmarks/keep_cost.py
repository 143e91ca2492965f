"""Seconds per training step and peak memory with and without keeping (`keep`).

python benchmarks/keep_cost.py [--layers 1] [--tokens 1024] [--answers 4 8] [--steps 5]

A random-weight model at the widths of Qwen2.5-VL-7B, NF4 base, r=16, gradient checkpointing, AdamW; a training step of
one sequence, a keep batch of as many answers, each of 48 tokens to a question of 24 about a picture of 448 x 448. Plain
and kept steps alternate on one model in one process, so that whatever else the machine does hits both; the ratio is the
median over pairs. Reading and tokenizing is left out: another thread does it while the model trains.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from models import device_name, qwen2_5_vl_7b, random_nf4
from step_overhead import peak, quiet, timed_step

from drift_peft import language_model_targets, telemetry
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.keeping.feed import Batch
from drift_peft.keeping.kept import Keeping

QUESTION, ANSWER, K = 24, 48, 32


class RandomFeed:
    """One batch of random pictures, questions and answers, again and again."""

    def __init__(self, model, answers: int, side: int):
        config, generator = model.config, torch.Generator().manual_seed(0)
        patches = side // config.vision_config.patch_size
        places = patches**2 // config.vision_config.spatial_merge_size**2
        width = 2 + places + QUESTION + ANSWER
        ids = torch.randint(100, 1000, (answers, width), generator=generator)
        ids[:, 0], ids[:, places + 1] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, 1 : places + 1] = config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inspect.signature(model.get_base_model().forward).parameters:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        values = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        inputs["pixel_values"] = torch.randn(answers * patches**2, values, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, patches, patches]] * answers)
        logprobs = torch.log_softmax(torch.randn(answers * ANSWER, 1000, generator=generator), -1)
        top = logprobs.topk(K)
        said = torch.ones(answers, ANSWER, dtype=torch.bool)
        self._batch, self.tokens = Batch(inputs, said, top.indices, top.values), answers * width

    def batch(self, number: int) -> Batch:
        return self._batch

    def read_ahead(self, number: int) -> None:
        pass


def compare(model, inputs: dict[str, torch.Tensor], feed: RandomFeed, steps: int) -> dict:
    """Alternate plain and kept steps; medians, and the ratio's median and quartiles."""
    device = inputs["input_ids"].device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times, peaks, ratio = {False: [], True: []}, {False: None, True: None}, None
    for step in range(steps + 1):  # the first one warms up
        for kept in (False, True) if step % 2 else (True, False):
            keeping = None
            if kept:
                keeping = Keeping(model, (), None, weight=1.0, bound=1.0, batch_size=1, every=1, seed=0)
                keeping.feed = feed
            peak(device)
            seconds = timed_step(model, optimizer, inputs)
            if step:
                times[kept].append(seconds)
                peaks[kept] = peak(device)
            if keeping is not None:
                ratio = telemetry(model)["keep_ratio"]
                keeping.release()
    ratios = sorted(after / before for before, after in zip(times[False], times[True], strict=True))
    return {
        "plain_s": statistics.median(times[False]),
        "kept_s": statistics.median(times[True]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "plain_peak_gb": peaks[False],
        "kept_peak_gb": peaks[True],
        "keep_ratio": ratio,
    }


def measure(
    layers: int, tokens: Sequence[int], answers: Sequence[int], steps: int, device: torch.device, smallest: bool
) -> list[dict]:
    model = random_nf4(qwen2_5_vl_7b(layers, smallest), device)
    targets = language_model_targets(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    with quiet():
        keep_4bit_differentiable(model)
    rows = []
    for length in tokens:
        ids = torch.randint(100, 1000, (1, length), device=device)
        for count in answers:
            feed = RandomFeed(model, count, side=56 if smallest else 448)
            row = {"model": f"7B widths, {layers} of 28 layers, NF4", "tokens": length, "answers": count}
            row["keep_tokens"] = feed.tokens
            rows.append({**row, **compare(model, {"input_ids": ids, "labels": ids}, feed, steps)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="default: all 28 with CUDA, else 1")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--smallest", action="store_true", help="narrow layers, to see that the script works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    layers = args.layers or (28 if device.type == "cuda" else 1)
    rows = measure(layers, args.tokens, args.answers, args.steps, device, args.smallest)
    columns = "model", "tokens", "answers", "their tokens", "plain s/step", "kept s/step", "ratio", "quartiles"
    table = Table(*columns, "plain peak GB", "kept peak GB", title=f"one training step on {device_name(device)}")
    for row in rows:
        memory = [row["plain_peak_gb"], row["kept_peak_gb"]]
        memory = ["no CUDA" if gb is None else f"{gb:.2f}" for gb in memory]
        spread = "–".join(f"{q:.3f}" for q in row["ratio_quartiles"])
        times = f"{row['plain_s']:.3f}", f"{row['kept_s']:.3f}", f"{row['ratio']:.3f}"
        counts = str(row["tokens"]), str(row["answers"]), str(row["keep_tokens"])
        table.add_row(row["model"], *counts, *times, spread, *memory)
    console = Console(width=160)
    console.print(table)
    if device.type != "cuda":
        console.print("GPU rows: not measured: no CUDA device")
    print(json.dumps({"benchmark": "keep_cost", "device": device_name(device), "rows": rows}))


if __name__ == "__main__":
    main()
