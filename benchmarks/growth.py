"""How cost grows with the model: building a prior, guiding a training step, merging; and what that says of 70B.

python benchmarks/growth.py [--smallest] [--figure benchmarks/results/growth.png]

One size varies at a time, the others keep their default. The models have random weights at the widths of the language
model of Qwen2.5-VL-7B, or at a half and a quarter of them, all in proportion and without embeddings. Builds and merges
run in processes of their own and read from the disk, not from the system's cache (Linux); their memory is anonymous
memory beyond that of the process before the call. A step's guidance is what `optimizer.step()` takes beyond plain LoRA,
on the gradient of a real backward pass: with `drift_norm="factor"` forward and backward are PEFT's own, so nothing else
differs. Beside each exponent, the slope in log-log, stands the arithmetic's: that of what the code multiplies or keeps,
counted over the same sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from forks import fork_context
from known_pair import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, make_base, make_expert, shapes
from models import qwen2_5_vl_7b, random_nf4, random_prior
from prior_build import forget, peak_memory, timed
from step_overhead import listen, optimizers, quiet
from transformers import Qwen2_5_VLConfig

from drift_peft import ReasoningPrior, build_prior, guide, language_model_targets, merge_adapter
from drift_peft.prior.svd import OVERSAMPLING
from drift_peft.tuner.steered import steered_of

FIGURE = Path(__file__).parent / "results" / "growth.png"
KRYLOV = 4  # blocks that the SVD of a large Δ keeps, beside Δ itself, which is whole in fp32
REPEATS, PAIRS = 3, 15  # processes per build and merge, and pairs of steps, of which the median counts


class Sizes(NamedTuple):
    """A model, its prior and its training."""

    width: int
    layers: int
    rank: int  # of the prior as built
    r: int  # of the adapter
    drift_rank: int  # columns of the prior that guide
    tokens: int


DEFAULT = Sizes(width=1792, layers=2, rank=64, r=16, drift_rank=16, tokens=256)
VALUES = Sizes((896, 1792, 3584), (2, 4, 8), (16, 32, 64, 128), (8, 16, 32, 64), (8, 16, 32, 64), (64, 256, 1024))
SMALLEST = Sizes(width=224, layers=1, rank=8, r=4, drift_rank=4, tokens=16)
SMALLEST_VALUES = Sizes((112, 224, 448), (1, 2, 3), (4, 8, 16), (2, 4, 8), (2, 4, 8), (8, 16, 32))
LARGE = DEFAULT._replace(width=8192, layers=80)  # Llama 3 70B
LARGE_SHAPES = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]  # 64 heads, 8 kv


def shapes_of(n: Sizes) -> list[tuple[int, int]]:
    """[out, in] of a layer's projections."""
    return LARGE_SHAPES if n.width == LARGE.width else list(shapes(HIDDEN // n.width).values())


class Quantity(NamedTuple):
    """What is measured, against what, and what the code multiplies or stores for it, as words and as a number."""

    name: str
    unit: str
    varied: tuple[str, ...]
    words: str
    count: Callable[[Sizes], float]

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


def sums(n: Sizes) -> tuple[int, int]:
    """Over all layers, Σ out·in and Σ (out + in)."""
    return n.layers * sum(map(math.prod, shapes_of(n))), n.layers * sum(map(sum, shapes_of(n)))


QUANTITIES = [
    Quantity("build", "s", ("width", "layers", "rank"), "Σ out·in·(rank + 16)",
             lambda n: sums(n)[0] * (n.rank + OVERSAMPLING)),
    Quantity("build", "GB", ("width", "layers", "rank"), "4·(out·in + 4·out·(rank + 16)) of the largest",
             lambda n: max(4 * (math.prod(s) + KRYLOV * max(s) * (n.rank + OVERSAMPLING)) for s in shapes_of(n))),
    Quantity("guidance", "s", ("width", "layers", "r", "drift_rank", "tokens"), "Σ (out + in)·r·(r + drift_rank)",
             lambda n: sums(n)[1] * n.r * (n.r + n.drift_rank)),
    Quantity("stacks", "GB", ("width", "layers", "r", "drift_rank", "tokens"), "Σ (2·(out + in) + 4)·drift_rank",
             lambda n: (2 * sums(n)[1] + 4 * n.layers * len(shapes_of(n))) * n.drift_rank),
    Quantity("merge", "s", ("width", "layers"), "Σ out·in", lambda n: sums(n)[0]),
    Quantity("merge", "GB", ("width", "layers"), "a block of rows", lambda n: 1),
]  # fmt: skip


# Builds and merges


def merge_and_sync(base: Path, adapter: Path, output: Path) -> None:
    merge_adapter(base, adapter, output, progress=False)
    for file in output.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def build(expert: Path, base: Path, output: Path, rank: int) -> None:
    build_prior(expert, base, output, rank=rank, progress=False)


def _run(connection, function: Callable, arguments: tuple) -> None:
    connection.send(peak_memory(os.getpid(), iter([True, False]).__next__))  # one sample
    connection.send(timed(function, *arguments)[0]["seconds"])


def alone(function: Callable, source: Path, other: Path, output: Path, *rest) -> tuple[float, float | None]:
    """Seconds, and GB beyond the process before the call, of making an output of two folders; in processes of their
    own, forked from one that has the imports where that can be done. The last output stays."""
    context = fork_context("drift_peft.merge", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    seconds, memory = [], []
    for _ in range(REPEATS):
        forget(source, other)
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sender, function, (source, other, output, *rest)))
        process.start()
        sender.close()
        before = receiver.recv()
        peak = peak_memory(process.pid, process.is_alive)
        if process.exitcode:
            raise SystemExit(f"{function.__name__} ended with exit code {process.exitcode}: its error is above")
        seconds.append(receiver.recv())
        memory.append(peak and peak - before)
    return statistics.median(seconds), None if None in memory else statistics.median(memory)


def on_disk(points: list[Sizes], rank: int, folder: Path) -> dict[Sizes, dict[str, float | None]]:
    """Build at these points of one model, and merge an adapter of this rank: the prior itself, exported."""
    width, layers = points[0][:2]
    base, expert, adapter = folder / "base", folder / "expert", folder / "adapter"
    make_base(base, layers, HIDDEN // width)
    make_expert(expert, base, 0.5, layers, HIDDEN // width)
    priors = {n.rank: folder / f"{n.rank}.safetensors" for n in points}
    builds = {k: alone(build, expert, base, prior, k) for k, prior in priors.items()}
    ReasoningPrior.load(priors[rank]).as_lora(1.0, adapter)
    merges = alone(merge_and_sync, base, adapter, folder / "merged")
    names = "build, s", "build, GB", "merge, s", "merge, GB"
    return {n: dict(zip(names, builds[n.rank] + merges, strict=True)) for n in points}


# Guidance


def config_of(n: Sizes) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's language model at this width, with few tokens and next to no vision tower."""
    config, shrink = qwen2_5_vl_7b(n.layers, smallest=True), HIDDEN // n.width
    text, half = config.text_config, HIDDEN // HEADS // shrink // 2
    text.vocab_size, text.hidden_size, text.intermediate_size = 128, n.width, INTERMEDIATE // shrink
    text.num_attention_heads, text.num_key_value_heads = HEADS, KV_HEADS
    rest = half - half // 4
    text.rope_parameters["mrope_section"] = [half // 4, rest // 2, rest - rest // 2]
    return config


def in_training(points: list[Sizes]) -> dict[Sizes, dict[str, float]]:
    """The guidance of a step at these points of one model."""
    model = random_nf4(config_of(points[0]), torch.device("cpu"))
    prior = random_prior(model, rank=max(n.drift_rank for n in points))
    found = {}
    for r, drift_rank, tokens in sorted({n[3:] for n in points}):
        lora = LoraConfig(r=r, target_modules=language_model_targets(model), task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, lora)
        with quiet():
            guide(wrapped, str(prior), drift_rank=drift_rank)
        seconds = beyond_lora(wrapped, tokens)
        stacks = sum(t.nbytes for s in steered_of(wrapped) for t in s.prior.values()) / 1e9
        found[r, drift_rank, tokens] = {"guidance, s": seconds, "stacks, GB": stacks}
        model = wrapped.unload()
    shutil.rmtree(prior.parent)
    return {n: found[n[3:]] for n in points}


def beyond_lora(model, tokens: int) -> float:
    """Seconds that a guided `optimizer.step()` takes beyond a plain one, in turns on the gradient of one backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    of, steered = optimizers(model), steered_of(model)
    ids = torch.randint(100, (1, tokens))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in parameters]
    differences = []
    for pair in range(PAIRS + 1):  # the first one warms up
        seconds = {}
        for guided in (False, True) if pair % 2 else (True, False):
            listen(steered, guided)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            start = time.perf_counter()
            of[guided].step()
            seconds[guided] = time.perf_counter() - start
        differences.append(seconds[True] - seconds[False])
    return statistics.median(differences[1:])


# What it says


def slope(values: Sequence[float], costs: Sequence[float | None]) -> float | None:
    """The exponent p of cost ∝ value^p: least squares in log-log. None where something was not measured."""
    if any(cost is None or cost <= 0 for cost in costs):
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (values, costs))
    return round(statistics.linear_regression(x, y).slope, 4) + 0.0  # no -0.0


def tabulate(found: dict[Sizes, dict], default: Sizes, sweeps: Sizes) -> list[dict]:
    """A row for each quantity and each size that it was measured against."""
    rows = []
    for quantity in QUANTITIES:
        for varied in quantity.varied:
            values = getattr(sweeps, varied)
            points = [default._replace(**{varied: value}) for value in values]
            costs, counted = zip(*((found[n][str(quantity)], quantity.count(n)) for n in points), strict=True)
            row = {"quantity": str(quantity), "varied": varied, "values": values, "measured": costs, "counted": counted}
            rows.append({**row, "exponent": slope(values, costs), "arithmetic": slope(values, counted)})
    return rows


def extrapolate(rows: list[dict], found: dict[Sizes, dict], largest: Sizes) -> dict:
    """Each quantity at 70B from its cost at the widest model measured: by what the arithmetic counts, and by the fitted
    exponents, for which a width stands in that has as many weights a layer in our proportions."""
    large = largest._replace(width=LARGE.width, layers=LARGE.layers)
    weights = [sums(n)[0] / n.layers for n in (large, largest)]
    wider, deeper = math.sqrt(weights[0] / weights[1]), large.layers / largest.layers
    costs = {}
    for quantity in QUANTITIES:
        measured = found[largest][str(quantity)]
        p = {row["varied"]: row["exponent"] for row in rows if row["quantity"] == str(quantity)}
        by_arithmetic = by_exponents = None
        if measured is not None:
            by_arithmetic = measured * quantity.count(large) / quantity.count(largest)
        if None not in (measured, p["width"], p["layers"]):
            by_exponents = measured * wider ** p["width"] * deeper ** p["layers"]
        costs[str(quantity)] = {"measured": measured, "by_arithmetic": by_arithmetic, "by_exponents": by_exponents}
    return {"from": largest._asdict(), "wider": wider, "deeper": deeper, "costs": costs}


def words(sizes: Sizes) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes._asdict().items())


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:#.3g}".rstrip(".")


def tables(rows: list[dict], extrapolated: dict, default: Sizes) -> list[Table]:
    """The exponents, and the extrapolation."""
    columns = "quantity", "varied", "values", "measured", "exponent", "arithmetic", "what it counts"
    growth = Table(*columns, title=f"one size varied, the others: {words(default)}")
    for quantity in QUANTITIES:
        for row in (row for row in rows if row["quantity"] == str(quantity)):
            exponents = ("" if p is None else f"{p:.2f}" for p in (row["exponent"], row["arithmetic"]))
            cells = "  ".join(map(str, row["values"])), "  ".join(map(number, row["measured"])), *exponents
            growth.add_row(row["quantity"], row["varied"], *cells, quantity.words)
        growth.add_section()
    start, wider, deeper = (extrapolated[key] for key in ("from", "wider", "deeper"))
    columns = "quantity", f"measured: width {start['width']}, layers {start['layers']}", "70B by arithmetic"
    large = Table(*columns, "70B by exponents", title="extrapolated, not measured: the layers of 70B, on this machine")
    for name, costs in extrapolated["costs"].items():
        large.add_row(name, *map(number, costs.values()))
    large.caption = (
        f"70B: {LARGE.layers} layers, hidden {LARGE.width}, intermediate 28672, 64 heads, 8 kv; embedding and head not "
        "counted. By arithmetic: measured · count(70B)/count(measured). By exponents: measured · "
        f"{wider:.2f}^p_width · {deeper:g}^p_layers, where {wider:.2f}² is the ratio of the weights of a layer."
    )
    return [growth, large]


# Colours that colour-blind eyes can tell apart (Okabe and Ito); the markers tell the same.
STYLES = {
    "width": ("#0072b2", "o"), "layers": ("#d55e00", "s"), "rank": ("#009e73", "^"), "r": ("#cc79a7", "v"),
    "drift_rank": ("#a6761d", "D"), "tokens": ("#444444", "P"),
}  # fmt: skip


def draw(rows: list[dict], default: Sizes, file: Path) -> None:
    """A panel for each quantity, all on the same axes: its cost against each size, both in multiples of the default's.

    Each line has its size and its exponent at its end; dotted, what the arithmetic says.
    """
    from matplotlib.figure import Figure  # here: measuring needs none

    from drift_peft.demo.figures import DPI, WIDTH, label_ends

    figure = Figure(figsize=(WIDTH, 7.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(3, 2, sharex=True, sharey=True)
    for quantity, axes in zip(QUANTITIES, panels.flat, strict=True):
        drawn = [row for row in rows if row["quantity"] == str(quantity) and row["exponent"] is not None]
        axes.set_title(f"{quantity}\n{quantity.words}", fontsize=9)
        for row in drawn:
            color, marker = STYLES[row["varied"]]
            middle = row["values"].index(getattr(default, row["varied"]))
            x, y, counted = (
                [value / row[key][middle] for value in row[key]] for key in ("values", "measured", "counted")
            )
            axes.plot(x, counted, color=color, ls=":", lw=1)
            axes.plot(x, y, color=color, marker=marker, ms=4, lw=1.3, label=f"{row['varied']} {row['exponent']:.2f}")
        for axis, scale in (("x", axes.set_xscale), ("y", axes.set_yscale)):
            scale("log", base=2)
            getattr(axes, f"{axis}axis").set_major_formatter("×{x:g}")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat:
        label_ends(axes, gap=0.1)
    figure.supxlabel(f"size, in multiples of its default: {words(default)}", fontsize=9)
    figure.supylabel("cost, in multiples of the default's", fontsize=9)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="narrow and shallow: shows that this works, no more")
    parser.add_argument("--figure", type=Path, help="file to draw to; with --smallest, none if not given")
    args = parser.parse_args(argv)
    default, sweeps = (SMALLEST, SMALLEST_VALUES) if args.smallest else (DEFAULT, VALUES)
    points = {default._replace(**{varied: v}) for varied in Sizes._fields for v in getattr(sweeps, varied)}
    found: dict[Sizes, dict] = {}
    start = time.perf_counter()
    for _, group in itertools.groupby(sorted(points), lambda n: n[:2]):  # one pair of models
        here = list(group)
        with tempfile.TemporaryDirectory() as folder:
            files = on_disk(here, default.rank, Path(folder))
        training = in_training(here)
        found |= {n: files[n] | training[n] for n in here}

    rows = tabulate(found, default, sweeps)
    extrapolated = extrapolate(rows, found, default._replace(width=max(sweeps.width)))
    for table in tables(rows, extrapolated, default):
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if figure := args.figure or (None if args.smallest else FIGURE):
        draw(rows, default, figure)
    result = {"benchmark": "growth", "smallest": args.smallest, "minutes": (time.perf_counter() - start) / 60}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "default": default._asdict()}
    result |= {"rows": rows, "extrapolated_70b": extrapolated}
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))))


if __name__ == "__main__":
    main()
