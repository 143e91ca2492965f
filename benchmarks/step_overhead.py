"""What guidance costs: seconds per training step and peak memory of LoRA, DRIFT, and the published method's way.

python benchmarks/step_overhead.py [--layers 1] [--tokens 1024 2048] [--steps 10] [--published] [--digits]
python benchmarks/step_overhead.py --python

A random-weight model at the widths of Qwen2.5-VL-7B's language model, NF4 base, r=16, prior of rank 64, gradient
checkpointing, AdamW. Plain and guided steps alternate on one model in one process, so that whatever else the machine
does hits both; the ratio is the median over pairs. LoRA is also measured alone, before there is any guidance: that is
its peak memory, since Δ_r stays with a guided model. `--digits` does the same on the demo's model, as it trains there.
`--published` adds the paper's own setting: full fine-tuning in bf16, the whole Δ in CPU memory, copied to the device
and subtracted from each weight's gradient in a backward hook. `--python` measures something else: what guiding 196
adapters costs the processor where the arithmetic is next to nothing, before and after an optimizer's own update.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from models import device_name, qwen2_5_vl_7b, random_nf4, random_prior, synchronize
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration

from drift_peft import DriftConfig, build_prior, guide, language_model_targets
from drift_peft.checkpoints import canonical_name, module_kind
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.tuner.batches import bias_gradients, groups_of
from drift_peft.tuner.steered import steered_of


def timed_step(model, optimizer, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of forward, backward, step and zero_grad."""
    device = next(iter(inputs.values())).device
    synchronize(device)
    start = time.perf_counter()
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    return time.perf_counter() - start


def peak(device: torch.device) -> float | None:
    """GB at the highest point since the last call; None without CUDA."""
    if device.type != "cuda":
        return None
    value = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return value


def listen(steered: list, guided: bool) -> None:
    """Guide the next step, or leave it plain LoRA: no bias, and no taps of drift_norm="weight"."""
    for s in steered:
        s.config.drift_alpha = float(guided)
        if s.capture is not None:
            s.capture.remove()
            if guided:
                s.capture.attach(s.module, s.adapter)


def optimizers(model) -> dict[bool, torch.optim.Optimizer]:
    """Of plain and of guided steps, with one state. What is guided is looked up once for an optimizer, as in training;
    with one for both, it would be looked up anew whenever the strength has changed."""
    plain, guided = (torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4) for _ in range(2))
    guided.state = plain.state
    return {False: plain, True: guided}


def lora_alone(model, inputs: dict[str, torch.Tensor], steps: int) -> dict:
    """Median and peak of plain LoRA's steps, of a model without guidance."""
    device, optimizer = next(iter(inputs.values())).device, optimizers(model)[False]
    times = [timed_step(model, optimizer, inputs) for _ in range(2)]  # these warm up
    peak(device)
    times = [timed_step(model, optimizer, inputs) for _ in range(steps)]
    return {"lora_alone_s": statistics.median(times), "lora_peak_gb": peak(device)}


def compare(model, inputs: dict[str, torch.Tensor], steps: int) -> dict:
    """Alternate plain and guided steps; medians, the ratio's median and its quartiles."""
    device = next(iter(inputs.values())).device
    of, steered = optimizers(model), steered_of(model)
    times, guided_peak = {False: [], True: []}, None
    for step in range(steps + 2):  # the first two warm up
        for guided in (False, True) if step % 2 else (True, False):
            listen(steered, guided)
            peak(device)
            seconds = timed_step(model, of[guided], inputs)
            if step >= 2:
                times[guided].append(seconds)
                guided_peak = peak(device) if guided else guided_peak
    ratios = sorted(after / before for before, after in zip(times[False], times[True], strict=True))
    return {
        "lora_s": statistics.median(times[False]),
        "drift_s": statistics.median(times[True]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "drift_peak_gb": guided_peak,
        "prior_gb": sum(t.nbytes for s in steered for t in s.prior.values()) / 1e9,
    }


def guidance_alone(model, device: torch.device, repeats: int = 20) -> float:
    """Seconds of the bias itself, gradients given."""
    steered = steered_of(model)
    listen(steered, True)
    factors = [s.parameter(factor) for s in steered for factor in s.factors]
    groups, seconds = groups_of(steered, {id(p) for p in factors}), []
    for _ in range(repeats):
        for p in factors:
            p.grad = torch.randn_like(p)
        synchronize(device)
        start = time.perf_counter()
        bias_gradients(groups)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    for p in factors:
        p.grad = None
    return statistics.median(seconds)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        yield


def measure_7b(layers: int, tokens: list[int], steps: int, device: torch.device, smallest: bool) -> list[dict]:
    """A row for each length with drift_norm="factor", and one with "weight" for the first."""
    model = random_nf4(qwen2_5_vl_7b(layers, smallest), device)
    prior = random_prior(model, rank=64)
    targets = language_model_targets(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    rows, inputs = [], {length: torch.randint(100, (1, length), device=device) for length in tokens}
    inputs = {length: {"input_ids": ids, "labels": ids} for length, ids in inputs.items()}
    alone = {length: lora_alone(model, inputs[length], steps) for length in tokens}
    for norm, lengths in (("factor", tokens), ("weight", tokens[:1])):
        with quiet():
            guide(model, str(prior), drift_norm=norm)
        for length in lengths:
            row = {"model": f"7B widths, {layers} of 28 layers, NF4", "tokens": length, "norm": norm}
            rows.append({**row, **alone[length], **compare(model, inputs[length], steps)})
        if norm == "factor":
            rows[0]["guidance_alone_s"] = guidance_alone(model, device)
    return rows


def measure_digits(steps: int) -> list[dict]:
    """The demo's model and batches, on the CPU, where the demo trains."""
    from drift_peft.demo.compare import EXPERT, VLM
    from drift_peft.demo.evaluate import encode
    from drift_peft.demo.train import ADAPTER, BATCH, load
    from drift_peft.demo.world import Digits, make_samples

    model, processor = load(VLM, four_bit=True)
    prior = Path(tempfile.mkdtemp()) / "prior.safetensors"
    build_prior(EXPERT, VLM, prior, rank=64, progress=False)
    inputs = dict(
        encode(processor, make_samples(BATCH, ["solve"], np.random.default_rng(0), Digits("train"), operations=(2, 3)))
    )
    keep_4bit_differentiable(model)
    model = get_peft_model(model, LoraConfig(target_modules=language_model_targets(model), **ADAPTER)).train()
    alone = lora_alone(model, inputs, steps)
    with quiet():
        guide(model, str(prior))
    row = {"model": "the demo's, NF4", "tokens": inputs["input_ids"].numel(), "norm": "factor"}
    return [{**row, **alone, **compare(model, inputs, steps)}]


class Stopwatch(torch.optim.Optimizer):
    """Plain descent that notes the CPU time at which its update begins and ends."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.began = time.process_time()
        for group in self.param_groups:
            torch._foreach_add_(group["params"], [p.grad for p in group["params"]], alpha=-group["lr"])
        self.ended = time.process_time()


def measure_python(steps: int, layers: int) -> dict:
    """CPU milliseconds of the guidance around an update, one thread, seven tiny adapters a layer; medians.

    `updates` is a hash of the trained factors, bit for bit: two versions of this library agree where it does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))
    config = DriftConfig(prior=random_prior(model, rank=8), r=8, lora_alpha=16, task_type="CAUSAL_LM")
    factors = [p for p in get_peft_model(model, config).parameters() if p.requires_grad]
    optimizer, generator = Stopwatch(factors), torch.Generator().manual_seed(0)
    before, after = [], []
    for step in range(steps + 2):  # the first two warm up
        for p in factors:
            p.grad = torch.randn(p.shape, generator=generator)
        start = time.process_time()
        optimizer.step()
        end = time.process_time()
        if step >= 2:
            before.append(optimizer.began - start)
            after.append(end - optimizer.ended)
    torch.set_num_threads(threads)
    updates = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in factors)).hexdigest()
    times = {"before_ms": 1e3 * statistics.median(before), "after_ms": 1e3 * statistics.median(after)}
    return {"adapters": len(factors) // 2, **times, "updates": updates[:16]}


def print_python(row: dict) -> None:
    table = Table("adapters", "before the update", "after it", "together", title="guidance of tiny adapters, CPU time")
    milliseconds = row["before_ms"], row["after_ms"], row["before_ms"] + row["after_ms"]
    table.add_row(str(row["adapters"]), *(f"{each:.2f} ms" for each in milliseconds))
    Console(width=160).print(table)
    print(json.dumps({"benchmark": "step_overhead --python", "rows": [row]}))


def measure_published(layers: int, tokens: int, steps: int, device: torch.device, smallest: bool) -> dict:
    """The paper's setting, from its description: every language-model weight trained in bf16, Δ on the CPU, and a
    hook on each weight's gradient that copies its Δ to the device and subtracts a·(1 + cos)/2·‖g‖·Δ/‖Δ‖."""
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_7b(layers, smallest)).train()
        torch.set_default_dtype(default)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hooked = []
    for name, parameter in model.named_parameters():
        trained = module_kind(canonical_name(name) or "") in ("attn", "mlp")
        parameter.requires_grad_(trained)
        if trained:
            hooked.append((parameter, (torch.randn_like(parameter) * 0.002).detach().cpu()))
    optimizer = torch.optim.AdamW([p for p, _ in hooked], lr=1e-6)
    ids = torch.randint(100, (1, tokens), device=device)

    def hook_of(delta: torch.Tensor):
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            D = delta.to(gradient.device)
            g_norm, D_norm = gradient.norm(), D.norm()
            cosine = (gradient * D).sum() / (g_norm * D_norm + 1e-12)
            return gradient - (1 + cosine) / 2 * g_norm / (D_norm + 1e-12) * D

        return hook

    result = {"tokens": tokens, "delta_on_cpu_gb": sum(delta.nbytes for _, delta in hooked) / 1e9}
    for kind in ("full_sft", "published"):
        handles = [p.register_hook(hook_of(delta)) for p, delta in hooked] if kind == "published" else []
        peak(device)
        times = [timed_step(model, optimizer, {"input_ids": ids, "labels": ids}) for _ in range(steps + 1)][1:]
        result[f"{kind}_s"], result[f"{kind}_peak_gb"] = statistics.median(times), peak(device)
        for handle in handles:
            handle.remove()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--digits", action="store_true", help="also the demo's model, on the CPU")
    parser.add_argument("--published", action="store_true", help="also full fine-tuning with Δ on the CPU (57 GB GPU)")
    parser.add_argument("--python", action="store_true", help="instead: the processor's time for 196 tiny adapters")
    parser.add_argument("--smallest", action="store_true", help="narrow layers, to see that the script works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.python:
        return print_python(measure_python(args.steps, layers=2 if args.smallest else 28))
    device = torch.device(args.device)
    rows = measure_7b(args.layers, args.tokens, args.steps, device, args.smallest)
    rows += measure_digits(args.steps) if args.digits else []
    published = measure_published(args.layers, args.tokens[0], 3, device, args.smallest) if args.published else {}

    columns = "model", "tokens", "norm", "LoRA alone s/step", "LoRA s/step", "DRIFT s/step", "ratio", "quartiles"
    columns += "LoRA alone peak GB", "DRIFT peak GB", "Δ_r GB"
    table = Table(*columns, title=f"one training step on {device_name(device)}")
    for row in rows:
        memory = [row["lora_peak_gb"], row["drift_peak_gb"]]
        memory = ["no CUDA" if gb is None else f"{gb:.2f}" for gb in memory]
        spread = "–".join(f"{q:.3f}" for q in row["ratio_quartiles"])
        times = (f"{row[key]:.3f}" for key in ("lora_alone_s", "lora_s", "drift_s", "ratio"))
        table.add_row(row["model"], str(row["tokens"]), row["norm"], *times, spread, *memory, f"{row['prior_gb']:.3f}")
    console = Console(width=160)
    console.print(table)
    console.print(f"the bias alone: {rows[0]['guidance_alone_s'] * 1e3:.1f} ms per step")
    if device.type != "cuda":
        console.print("GPU rows: not measured: no CUDA device")
    if published:
        memory = published["published_peak_gb"]
        console.print(
            f"published way, {published['tokens']} tokens: full SFT {published['full_sft_s']:.3f} s/step, with Δ from "
            f"the CPU {published['published_s']:.3f} s/step; Δ on the CPU {published['delta_on_cpu_gb']:.1f} GB; peak "
            + ("not measured: no CUDA device" if memory is None else f"{memory:.1f} GB")
        )
    print(
        json.dumps({"benchmark": "step_overhead", "device": device_name(device), "rows": rows, "published": published})
    )


if __name__ == "__main__":
    main()
