"""What building a prior costs: seconds per layer, peak memory, captured energy, beside exact SVDs of the same matrices.

python benchmarks/prior_build.py [--layers 1] [--decay 0.5 0.25] [--rank 64] [--no-exact] [--mergekit BIN] [--keep DIR]

On checkpoints with random bf16 weights at the widths of the pair Qwen2.5-VL-7B + DeepSeek-R1-Distill-Qwen-7B, whose
difference has the singular values σ_i ∝ i^-decay plus what rounding to bf16 adds. `--layers 28` is the whole language
model: 26 GB of temporary files. The build and the floor read from the disk, not from the system's cache (Linux).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
from forks import fork_context
from known_pair import make_base, make_expert, read_delta, shapes, spectrum

from drift_peft import ReasoningPrior, build_prior
from drift_peft.prior.svd import frobenius_norm, truncated_svd

WHOLE = 28  # layers of the 7B pair


def timed(function: Callable, *arguments) -> tuple[dict[str, float], object]:
    """Seconds and CPU seconds of a call, and what it returns."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}, result


def peak_memory(pid: int, running: Callable[[], bool]) -> float | None:
    """Peak anonymous memory of a process in GB, sampled until it ends; None where there is no /proc."""
    peak = None
    while running():
        with contextlib.suppress(OSError):  # no /proc, or the process has just ended
            if anonymous := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
                peak = max(peak or 0, int(anonymous[1]) * 1024 / 1e9)
        time.sleep(0.005)
    return peak


def forget(*folders: Path) -> None:
    """Take the files out of the system's cache, where that can be done."""
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        if hasattr(os, "posix_fadvise"):
            descriptor = os.open(file, os.O_RDWR)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _build(connection, arguments: dict) -> None:
    connection.send(timed(lambda: build_prior(**arguments, progress=False) and None)[0])


def build(expert: Path, base: Path, output: Path, rank: int) -> dict:
    """`build_prior` in a process of its own: its time, without the imports, and its peak memory."""
    context = fork_context("drift_peft.prior")
    receiver, sender = context.Pipe(duplex=False)
    arguments = {"expert": expert, "base": base, "output": output, "rank": rank}
    process = context.Process(target=_build, args=(sender, arguments))
    process.start()
    peak = peak_memory(process.pid, process.is_alive)
    if process.exitcode:
        raise SystemExit(f"the build ended with exit code {process.exitcode}: its error is above")
    return {**receiver.recv(), "peak_gb": peak}


def extract_lora(bin: Path, expert: Path, base: Path, folder: Path, rank: int) -> dict:
    """mergekit-extract-lora on the same files: its time, without that of its start as `--help` shows it, and memory."""
    command = [bin / "mergekit-extract-lora", "--model", expert, "--base-model", base, "--out-path", folder / "lora"]
    command += ["--max-rank", str(rank), "--exclude-regex", "embed_tokens|lm_head|norm"]
    startup, _ = timed(lambda: subprocess.run([command[0], "--help"], stdout=subprocess.DEVNULL, check=True))
    start = time.perf_counter()
    with open(folder / "mergekit.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = peak_memory(process.pid, lambda: process.poll() is None)
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"mergekit-extract-lora ended with exit code {process.returncode}:\n{log.read()[-2000:]}")
    return {"seconds": time.perf_counter() - start - startup["seconds"], "peak_gb": peak}


def read_and_subtract(expert: Path, base: Path) -> None:
    """The floor: nothing can be built without this."""
    for file in sorted(expert.glob("*.safetensors")):
        with safe_open(file, "pt") as ours, safe_open(base / file.name, "pt") as other:
            for key in ours.keys():
                ours.get_tensor(key).float().sub_(other.get_tensor(key))


def compare(module: str, expert: Path, base: Path, decay: float, rank: int, exact: bool) -> dict:
    """One matrix: `truncated_svd` (median of three), `torch.linalg.svd`, and the best energy that the rank can hold."""
    delta = read_delta(module, expert, base)
    runs = [timed(truncated_svd, delta, rank) for _ in range(3)]
    row = {"shape": list(delta.shape), "energy": runs[0][1][3]}
    row |= {key: statistics.median(time[key] for time, _ in runs) for key in ("seconds", "cpu_seconds")}
    S = spectrum(delta.shape, decay)  # before rounding to bf16
    if exact:
        row["exact"], (_, S, _) = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
        row["times_as_fast"] = row["exact"]["seconds"] / row["seconds"]
    return {**row, "best_energy": float(S[:rank].double().square().sum()) / frobenius_norm(delta) ** 2}


def energy_of_lora(folder: Path, module: str, expert: Path, base: Path) -> float:
    """1 − ‖Δ − B·A‖²/‖Δ‖² of a module of the first layer, for the adapter that mergekit has written."""
    delta = read_delta(module, expert, base)
    total = frobenius_norm(delta) ** 2
    with safe_open(folder / "lora" / "adapter_model.safetensors", "pt") as adapter:
        names = (f"base_model.model.model.layers.0.{module}.lora_{side}.weight" for side in "BA")
        B, A = (adapter.get_tensor(name).float() for name in names)
    return 1 - frobenius_norm(delta.sub_(B @ A)) ** 2 / total


def measure(folder: Path, base: Path, decay: float, args: argparse.Namespace) -> dict:
    """All numbers of one decay."""
    expert = folder / f"expert-{decay}"
    make_expert(expert, base, decay, args.layers, args.shrink)
    forget(expert, base)
    floor, _ = timed(read_and_subtract, expert, base)
    forget(expert, base)
    prior = folder / f"prior-{decay}.safetensors"
    row = {"decay": decay, "build": build(expert, base, prior, args.rank), "floor": floor}
    one_of_each = {shape: module for module, shape in reversed(shapes(args.shrink).items())}
    row["matrices"] = [compare(m, expert, base, decay, args.rank, args.exact) for m in one_of_each.values()]
    if args.exact:
        exact = sum(matrix["exact"]["seconds"] for matrix in row["matrices"])
        row["times_as_fast"] = exact / sum(matrix["seconds"] for matrix in row["matrices"])
    best = {tuple(matrix["shape"]): matrix["best_energy"] for matrix in row["matrices"]}
    weights = ReasoningPrior.load(prior).metadata["weights"].values()
    row["build"]["energy_of_best"] = min(stats["energy"] / best[tuple(stats["shape"])] for stats in weights)
    if args.mergekit:
        forget(expert, base)
        row["mergekit"] = extract_lora(args.mergekit, expert, base.with_name("base-text"), folder, args.rank)
        held = {shape: energy_of_lora(folder, module, expert, base) for shape, module in one_of_each.items()}
        row["mergekit"]["energy_of_best"] = min(held[shape] / best[shape] for shape in best)
        shutil.rmtree(folder / "lora")
    if not args.keep:
        shutil.rmtree(expert)
    for part in ("build", "floor", "mergekit"):
        if part in row:
            row[part]["seconds_28_layers"] = row[part]["seconds"] / args.layers * WHOLE
    return row


def tables(rows: list[dict], args: argparse.Namespace) -> list[Table]:
    """One table of the passes over all files, one of the single matrices."""
    layers, threads = f"{args.layers} layer{'s' * (args.layers > 1)}", torch.get_num_threads()
    how = "measured" if args.layers == WHOLE else f"extrapolated from {layers}"
    widths = "the widths of the 7B pair" + (f" / {args.shrink}" if args.shrink > 1 else "")
    gpu = f", {torch.cuda.get_device_name()} for build_prior" if torch.cuda.is_available() else ""
    passes = Table(title=f"{layers} at {widths}, rank {args.rank}, {threads} threads{gpu}")
    for column in ("σ_i", "pass", "s per layer", f"s for {WHOLE} layers,\n{how}", "peak memory", "energy / best"):
        passes.add_column(column, justify="left" if column in ("σ_i", "pass") else "right")
    matrices = Table(title="one matrix of each shape")
    for column in ("σ_i", "matrix", "torch.linalg.svd", "truncated_svd", "times as fast", "energy", "energy / best"):
        matrices.add_column(column, justify="left" if column in ("σ_i", "matrix") else "right")

    names = {"build": "build_prior", "floor": "read and subtract", "mergekit": "mergekit-extract-lora"}
    for row in rows:
        sigma = f"∝ i^-{row['decay']:g}"
        for key in (key for key in names if key in row):
            memory, energy = "", ""
            if key != "floor":
                memory = f"{row[key]['peak_gb']:.2f} GB" if row[key]["peak_gb"] else "not measured"
                energy = f"{row[key]['energy_of_best']:.4f}"
            seconds = f"{row[key]['seconds'] / args.layers:.2f}", f"{row[key]['seconds_28_layers']:.0f}"
            passes.add_row(sigma, names[key], *seconds, memory, energy)
        for m in row["matrices"]:
            ours, energy = f"{m['seconds']:.3f} s", (f"{m['energy']:.4f}", f"{m['energy'] / m['best_energy']:.4f}")
            exact = (f"{m['exact']['seconds']:.2f} s", f"{m['times_as_fast']:.0f}") if args.exact else ("", "")
            matrices.add_row(sigma, "×".join(map(str, m["shape"])), exact[0], ours, exact[1], *energy)
        if args.exact:
            matrices.add_row(sigma, "all of them", "", "", f"{row['times_as_fast']:.0f}")
    return [passes, matrices]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--decay", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="exact SVDs, two minutes")
    parser.add_argument("--mergekit", type=Path, metavar="BIN", help="bin folder of an environment with mergekit")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="new folder for the checkpoints, which are then not deleted"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths; 32 is a test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() if args.keep is None else contextlib.nullcontext(args.keep) as folder:
        base = Path(folder) / "base"
        make_base(base, args.layers, args.shrink)
        rows = [measure(Path(folder), base, decay, args) for decay in args.decay]
    for table in tables(rows, args):
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    settings = {"layers": args.layers, "extrapolated": args.layers != WHOLE, "rank": args.rank, "shrink": args.shrink}
    result = {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))))


if __name__ == "__main__":
    main()
