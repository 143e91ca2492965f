"""What keeping costs: seconds per training step and peak memory with and without `keep`.

python benchmarks/keep_cost.py [--layers 1] [--tokens 1024] [--answers 4 8] [--micro-batches 4 8]
    [--every 1 4] [--steps 5] [--digits --device cpu]

A random-weight model at the widths of Qwen2.5-VL-7B, NF4 base, r=16, gradient checkpointing, AdamW; a training step of
one sequence, a keep batch of as many answers, each of 48 tokens to a question of 24 about a picture of 448 x 448. Plain
and kept steps alternate on one model in one process, so that whatever else the machine does hits both; the ratio is the
median over pairs. On the CPU the time is the processor's, of the thread that trains: another one reads and tokenizes
keep batches meanwhile. `--digits` does it on the demo's model instead, as it trains there and with its own keep set;
elsewhere the batch is random. Memory is that of tensors: CUDA's allocator tells it, and without CUDA all that is made
in a step is counted, with what was there before it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from models import device_name, qwen2_5_vl_7b, random_nf4, synchronize
from step_overhead import peak, quiet

from drift_peft import keep, language_model_targets, make_keep_set, telemetry
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.keeping.feed import Part
from drift_peft.keeping.kept import Keeping
from drift_peft.preflight.dry_run import Live

QUESTION, ANSWER, K = 24, 48, 32


@dataclass(frozen=True)
class Setting:
    """What is compared: `begin()` keeps the model, and without it `samples` micro-batches of `inputs` make a step."""

    inputs: dict[str, torch.Tensor]
    micro_batches: int
    every: int
    begin: Callable[[int], None]


class RandomFeed:
    """One batch of random pictures, questions and answers, again and again."""

    def __init__(self, model, answers: int, side: int):
        config, self.answers, self.generator = model.config, answers, torch.Generator().manual_seed(0)
        self.patches = (side // config.vision_config.patch_size) ** 2
        self.places = self.patches // config.vision_config.spatial_merge_size**2
        self.width = 2 + self.places + QUESTION + ANSWER
        self.config, self.kinds = config, inspect.signature(model.get_base_model().forward).parameters

    def part(self, answers: int) -> Part:
        config = self.config
        ids = torch.randint(100, 1000, (answers, self.width), generator=self.generator)
        ids[:, 0], ids[:, self.places + 1] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, 1 : self.places + 1] = config.image_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in self.kinds:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        values = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        inputs["pixel_values"] = torch.randn(answers * self.patches, values, generator=self.generator)
        inputs["image_grid_thw"] = torch.tensor([[1, *[int(self.patches**0.5)] * 2]] * answers)
        top = torch.log_softmax(torch.randn(answers * ANSWER, 1000, generator=self.generator), -1).topk(K)
        return Part(inputs, torch.ones(answers, ANSWER, dtype=torch.bool), top.indices, top.values)

    def batch(self, number: int, tokens: int) -> list[Part]:
        size = max(1, tokens // self.width)
        return [self.part(min(size, self.answers - i)) for i in range(0, self.answers, size)]

    def read_ahead(self, number: int, tokens: int) -> None:
        pass


def steps_of(model, optimizer, setting: Setting) -> None:
    """As many steps as there are from one keep batch to the next."""
    for _ in range(setting.every):
        for _ in range(setting.micro_batches):
            model(**setting.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(model, setting: Setting, repeats: int) -> dict:
    """Alternate plain and kept steps; medians of seconds a step, and the ratio's median and quartiles."""
    device = setting.inputs["input_ids"].device
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times, peaks, ratio = {False: [], True: []}, {False: None, True: None}, None
    for repeat in range(repeats + 1):  # the first one warms up
        for kept in (False, True) if repeat % 2 else (True, False):
            if kept:
                setting.begin(setting.every)
            peak(device)
            synchronize(device)
            start = clock()
            steps_of(model, optimizer, setting)
            synchronize(device)
            seconds = (clock() - start) / setting.every
            if repeat:
                times[kept].append(seconds)
                peaks[kept] = peak(device)
            if kept:
                ratio = telemetry(model)["keep_ratio"]
                keep(model, None)
    if device.type == "cpu":
        peaks = {kept: counted(model, optimizer, setting, kept) for kept in peaks}
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


def counted(model, optimizer, setting: Setting, kept: bool) -> float:
    """GB of tensors at the peak of a step: what lies there before it, and what is made in it."""
    if kept:
        setting.begin(1)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    at_rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *states))
    with Live() as live:
        steps_of(model, optimizer, replace(setting, every=1))
    keep(model, None)
    return (at_rest + max(live.peaks.values())) / 1e9


def measure_7b(args: argparse.Namespace, layers: int, device: torch.device) -> list[dict]:
    model = random_nf4(qwen2_5_vl_7b(layers, args.smallest), device)
    targets = language_model_targets(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    with quiet():
        keep_4bit_differentiable(model)
    rows = []
    for length in args.tokens:
        ids = torch.randint(100, 1000, (1, length), device=device)
        for answers, micro_batches in zip(args.answers, args.micro_batches, strict=True):
            feed = RandomFeed(model, answers, side=56 if args.smallest else 448)

            def begin(every: int, feed: RandomFeed = feed) -> None:
                Keeping(model, (), None, 1.0, 1.0, batch_size=1, every=every, seed=0).feed = feed

            for every in args.every:
                widths = "narrow" if args.smallest else "7B widths"
                row = {"model": f"{widths}, {layers} of 28 layers, NF4", "tokens": micro_batches * length}
                row |= {"answers": answers, "keep_tokens": answers * feed.width, "every": every}
                setting = Setting({"input_ids": ids, "labels": ids}, micro_batches, every, begin)
                rows.append({**row, **compare(model, setting, args.steps)})
    return rows


def measure_digits(args: argparse.Namespace) -> list[dict]:
    """The demo's model, batches and keep set, on the CPU, where the demo trains."""
    from drift_peft.demo.compare import KEEP_SET, QUESTIONS, VLM, unlabelled
    from drift_peft.demo.evaluate import encode
    from drift_peft.demo.train import ADAPTER, BATCH, load
    from drift_peft.demo.world import Digits, make_samples

    model, processor = load(VLM, four_bit=True)
    digits = Digits("train")
    keep_set = Path(tempfile.mkdtemp()) / "keep.safetensors"
    keep_set = make_keep_set(VLM, unlabelled(digits, 0), keep_set, QUESTIONS, **KEEP_SET, progress=False)
    with quiet():
        keep_4bit_differentiable(model)
    model = get_peft_model(model, LoraConfig(target_modules=language_model_targets(model), **ADAPTER)).train()
    inputs = dict(
        encode(processor, make_samples(BATCH, ["solve"], np.random.default_rng(0), digits, operations=(2, 3)))
    )
    rows = []
    for answers in (8, BATCH):

        def begin(every: int, answers: int = answers) -> None:
            keep(model, keep_set, processor, batch_size=answers, every=every)

        for every in args.every:
            row = {"model": "the demo's, NF4", "tokens": inputs["input_ids"].numel(), "answers": answers}
            row |= {"keep_tokens": keep_tokens(keep_set, processor, answers), "every": every}
            rows.append({**row, **compare(model, Setting(inputs, 1, every, begin), args.steps)})
    return rows


def keep_tokens(keep_set, processor, answers: int) -> int:
    from drift_peft.keeping.feed import Feed

    (part,) = Feed(keep_set, processor, answers, 0).read(0, 2**31)
    return part.inputs["input_ids"].numel()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="default: all 28 with CUDA, else 1")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="of a micro-batch")
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 8], help="of a keep batch")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8], help="of a step, for each of --answers")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--digits", action="store_true", help="the demo's model instead, on the CPU")
    parser.add_argument("--smallest", action="store_true", help="narrow layers, to see that the script works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if len(args.micro_batches) != len(args.answers):
        parser.error("--micro-batches wants a number for each of --answers")
    sizes = ("layers", "tokens", "answers", "micro_batches", "smallest")
    if args.digits and (set_ := [name for name in sizes if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--digits has the demo's sizes: leave out --{set_[0].replace('_', '-')}")
    if args.digits and args.device != "cpu":
        parser.error("--digits measures where the demo trains: add --device cpu")
    device = torch.device(args.device)
    layers = args.layers or (28 if device.type == "cuda" else 1)
    rows = measure_digits(args) if args.digits else measure_7b(args, layers, device)
    columns = "model", "tokens", "answers", "their tokens", "every", "plain s/step", "kept s/step", "ratio", "quartiles"
    table = Table(*columns, "plain peak GB", "kept peak GB", title=f"one training step on {device_name(device)}")
    for row in rows:
        memory = f"{row['plain_peak_gb']:.4f}", f"{row['kept_peak_gb']:.4f}"
        spread = "–".join(f"{q:.3f}" for q in row["ratio_quartiles"])
        times = f"{row['plain_s']:.3f}", f"{row['kept_s']:.3f}", f"{row['ratio']:.3f}"
        counts = str(row["tokens"]), str(row["answers"]), str(row["keep_tokens"]), str(row["every"])
        table.add_row(row["model"], *counts, *times, spread, *memory)
    console = Console(width=160)
    console.print(table)
    if device.type != "cuda":
        console.print("Seconds are the processor's, of the thread that trains.")
    if device.type != "cuda" and not args.digits:
        console.print("GPU rows: not measured: no CUDA device")
    print(json.dumps({"benchmark": "keep_cost", "device": device_name(device), "rows": rows}))


if __name__ == "__main__":
    main()
