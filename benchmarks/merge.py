"""What a merge costs: time and peak memory of `merge_adapter`, beside a plain copy and a merge in memory.

python benchmarks/merge.py [--layers 28] [--rank 16] [--repeat 1] [--no-dequantized] [--no-memory] [--smallest]

On a Qwen2.5-VL-7B of random bf16 weights and a random LoRA adapter of its language model. Every pass reads from the
disk, not from the system's cache (Linux), in a process of its own, and syncs what it has written. The floor reads,
writes and syncs the same bytes. With `--repeat` the passes take turns, and the table has the fastest of each, which
other work on the machine disturbed least. 28 layers take 33 GB of temporary files; `merge_and_unload` then needs 20 GB
of memory.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from forks import fork_context
from models import qwen2_5_vl_7b
from prior_build import forget, peak_memory, timed

from drift_peft import language_model_targets, merge_adapter

SHARD = 2e9  # bytes
TIMES_THE_FLOOR, TIMES_THE_LARGEST = 2, 3  # what we claim: of time, and of the largest tensor in fp32


def make_base(folder: Path, layers: int, smallest: bool) -> Qwen2_5_VLForConditionalGeneration:
    """Write the model, a shard at a time; returns it on the meta device."""
    folder.mkdir()
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_7b(layers, smallest))
    model.config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shard, weight_map, shards = {}, {}, 0
    for name, tensor in model.state_dict().items():
        shard[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(map(torch.Tensor.numel, shard.values())) * 2 > SHARD or name == list(model.state_dict())[-1]:
            file = f"model-{shards:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, shards = {}, shards + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def make_adapter(folder: Path, model: Qwen2_5_VLForConditionalGeneration, rank: int) -> None:
    config = LoraConfig(r=rank, target_modules=language_model_targets(model), task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in PeftModel(model, config).named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            factor = torch.empty(module.weight.shape).normal_(0, 0.02, generator=generator)
            tensors[f"{name.removesuffix('.default')}.weight"] = factor
    save_file(tensors, folder / "adapter_model.safetensors")


def copy(base: Path, adapter: Path, output: Path) -> None:
    shutil.copytree(base, output)


def stream(base: Path, adapter: Path, output: Path) -> None:
    merge_adapter(base, adapter, output, progress=False)


def stream_dequantized(base: Path, adapter: Path, output: Path) -> None:
    merge_adapter(base, adapter, output, onto="dequantized", progress=False)


def in_memory(base: Path, adapter: Path, output: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


PASSES = {
    "read, write and sync": copy,
    "merge_adapter": stream,
    'merge_adapter(onto="dequantized")': stream_dequantized,
    "merge_and_unload, save_pretrained": in_memory,
}


def _synced(merge: Callable, base: Path, adapter: Path, output: Path) -> None:
    merge(base, adapter, output)
    for file in output.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _run(connection, arguments: tuple) -> None:
    connection.send(timed(_synced, *arguments)[0])


def measure(merge: Callable, folder: Path) -> dict:
    """A pass in a process of its own: its time, without the imports, and its peak memory."""
    base, adapter, output = folder / "base", folder / "adapter", folder / "output"
    forget(base, adapter)
    context = fork_context("drift_peft.merge", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, (merge, base, adapter, output)))
    process.start()
    peak = peak_memory(process.pid, process.is_alive)
    if process.exitcode:
        raise SystemExit(f"{merge.__name__} ended with exit code {process.exitcode}: its error is above")
    shutil.rmtree(output)
    return {**receiver.recv(), "peak_gb": peak}


def fastest(runs: list[dict]) -> dict:
    """Of the runs of a pass, with the highest of their peaks and the seconds of each."""
    peaks = [run["peak_gb"] for run in runs if run["peak_gb"]]
    best = min(runs, key=lambda run: run["seconds"])
    return {**best, "peak_gb": max(peaks, default=None), "runs": [run["seconds"] for run in runs]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1, help="how often each pass runs, in turns")
    parser.add_argument(
        "--dequantized", action=argparse.BooleanOptionalAction, default=True, help="onto 4 bits as well"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="merge in memory as well")
    parser.add_argument("--smallest", action="store_true", help="narrow and shallow: shows that this works, no more")
    args = parser.parse_args(argv)
    layers = 1 if args.smallest else args.layers
    with tempfile.TemporaryDirectory() as folder:
        model = make_base(Path(folder, "base"), layers, args.smallest)
        sizes = [math.prod(parameter.shape) for parameter in model.parameters()]
        make_adapter(Path(folder, "adapter"), model, args.rank)
        left_out = {in_memory: not args.memory, stream_dequantized: not args.dequantized}
        passes = {name: merge for name, merge in PASSES.items() if not left_out.get(merge)}
        turns = [{name: measure(merge, Path(folder)) for name, merge in passes.items()} for _ in range(args.repeat)]
        rows = {name: fastest([turn[name] for turn in turns]) for name in passes}

    floor, largest = rows["read, write and sync"]["seconds"], 4 * max(sizes) / 1e9
    table = Table(title=f"{2 * sum(sizes) / 1e9:.1f} GB in bf16, {layers} layers, {torch.get_num_threads()} threads")
    for column in ("pass", "seconds", "times the floor", "peak memory", "times the largest tensor in fp32"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for name, row in rows.items():
        row["times_the_floor"] = row["seconds"] / floor
        row["times_the_largest"] = row["peak_gb"] and row["peak_gb"] / largest
        memory = f"{row['peak_gb']:.2f} GB" if row["peak_gb"] else "not measured"
        times = f"{row['times_the_largest']:.2f}" if row["peak_gb"] else ""
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['times_the_floor']:.2f}", memory, times)
    table.caption = f"merge_adapter: at most {TIMES_THE_FLOOR} times the floor, memory below {TIMES_THE_LARGEST} times"
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    result = {"layers": layers, "smallest": args.smallest, "rank": args.rank, "gb": 2 * sum(sizes) / 1e9}
    result |= {"largest_fp32_gb": largest, "threads": torch.get_num_threads(), "rows": rows}
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))))


if __name__ == "__main__":
    main()
