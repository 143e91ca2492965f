"""The whole way once: prior, 4-bit LoRA training, merge, reload, examination; DRIFT beside its rivals."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..arguments import nearest
from ..atomic import write_json, write_text
from ..checkpoints import one_thread
from ..keeping import make_keep_set
from ..merge import merge_adapter
from ..prior import ReasoningPrior, build_prior
from .evaluate import MEASURES, ask, examine, exams, is_right
from .train import STEPS, fine_tune, load, task_arithmetic
from .world import Digits, Sample, make_samples

CHECKPOINTS = Path(__file__).parent / "checkpoints"
VLM, EXPERT = CHECKPOINTS / "vlm", CHECKPOINTS / "reasoner"
PRIOR, KEPT, RESULTS, PICTURES = "prior.safetensors", "keep.safetensors", "results.json", ("results.png", "samples.png")
STUDY = "study.json"  # the results of several seeds
# Keys of results.json from the start of a run on, and those that come in the end: by them its folder is known.
BEGUN, DONE = {"seed", "steps", "size", "split"}, {"titles", "rates", "scores", "history", "examples", "seconds"}
TUNING = Path(__file__).parent / "tuning.json"  # written by benchmarks/tune_demo.py
QUESTIONS = [("read", "read?"), ("count", "count?"), *(("at", f"at{place}?") for place in range(1, 6))]
KEEP_SET = {"samples": 240, "max_new_tokens": 12, "top_k": 8, "batch_size": 60}
EXTRAS = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Method:
    """One row of the table: `merged` · Δ is added to the model beforehand, then an adapter is trained if `trained`.

    `drift` holds settings of DriftConfig, where {} means its defaults; None trains plain LoRA. `kept` keeps the
    model near the VLM's own answers to images without labels.
    """

    title: str
    merged: float = 0.0
    trained: bool = False
    drift: dict | None = None
    kept: bool = False


METHODS = {
    "vlm": Method("VLM as it is"),
    "merge-0.5": Method("task arithmetic 0.5", merged=0.5),
    "merge-0.8": Method("task arithmetic 0.8", merged=0.8),
    "swap": Method("reasoner swapped in", merged=1.0),  # the whole of it, which is task arithmetic 1
    "lora": Method("LoRA", trained=True),
    "swap-lora": Method("swapped, then LoRA", merged=1.0, trained=True),
    "drift": Method("DRIFT", trained=True, drift={}),
    "decoupled": Method(
        "DRIFT decoupled",
        trained=True,
        drift={"drift_scale": "decoupled", "drift_target": "factors", "drift_alpha": 30.0},
    ),
    "lora-keep": Method("LoRA, keeping", trained=True, kept=True),
    "drift-keep": Method("DRIFT, keeping", trained=True, drift={}, kept=True),
}


def run(
    out: str | Path | None = None,
    seed: int = 0,
    methods: Iterable[str] = tuple(METHODS),
    *,
    steps: int = STEPS,
    size: int = 300,
    split: str = "test",
    rates: dict[str, float] | None = None,
    show: bool = True,
    executor: Executor | None = None,
) -> dict:
    """Build the prior, train, merge and examine every method, and print one table on stdout.

    Args:
        out: folder that keeps everything: prior, keep set, adapters, merged models, results.json, results.png,
            samples.png. What an earlier run left there, finished or not, is replaced. None keeps nothing.
        seed: of the training samples, their order, the adapters' starts and the exams.
        methods: keys of `METHODS`.
        steps: optimizer steps of 16 samples for every method that trains.
        size: samples per exam.
        split: the digits of the exams.
        rates: learning rate by method; by default those that did best on validation digits (tuning.json).
        show: print the table.
        executor: of processes, which carry out the methods, in one thread each; None does it here, one after another.

    Returns:
        What results.json holds: `scores` by method and exam (shares of right answers), `history` of the adapters,
        `examples` and `seconds`.

    Raises:
        ImportError: an extra of the demo is not installed.
        ValueError: an unknown method, or no learning rate of one.
        OSError: the folder holds files of these names that no run has written, or cannot be written.
    """
    methods = list(methods)
    rates = learning_rates() if rates is None else rates
    check(methods, rates)
    check_folder(out)
    with one_thread(), quiet(), working_folder(out) as folder:
        start = time.perf_counter()
        result = {"seed": seed, "steps": steps, "size": size, "split": split}
        write_json(folder / RESULTS, result)
        for left in _written(folder):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        build_prior(EXPERT, VLM, folder / PRIOR, overwrite=True)
        train_digits = Digits("train")
        if any(METHODS[key].kept for key in methods):
            images = unlabelled(train_digits, seed)
            make_keep_set(VLM, images, folder / KEPT, QUESTIONS, **KEEP_SET, overwrite=True)
        tests = exams(split, seed, size)
        shown = tests["2-3 operations"][:3] + tests["4-5 operations"][:3]
        given = {
            "samples": make_samples(200, ["solve"], np.random.default_rng([seed, 1]), train_digits, operations=(2, 3)),
            "steps": steps,
            "seed": seed,
            "tests": tests,
            "shown": shown,
            "progress": executor is None,
        }
        rows = {key: (METHODS[key], folder, folder / key, rates.get(key)) for key in methods}
        rows = dict(tqdm(carried_out(rows, given, executor), desc="methods", unit="method", total=len(rows)))

        result |= results_of({key: rows[key] for key in methods}, rates, shown)
        result["seconds"] = round(time.perf_counter() - start, 1)
        if out is not None:
            from .figures import draw_results, draw_samples

            write_json(folder / RESULTS, result)
            draw_results(result, folder / PICTURES[0])
            draw_samples([sample.image for sample in shown], result, folder / PICTURES[1])
    if show:
        print_table([result])
        if out is None:
            print("Nothing was kept; --out FOLDER keeps the prior, adapters, merged models, results and pictures.")
        else:
            print(f"{out} holds {', '.join(path.name for path in [*_written(folder), folder / RESULTS])}.")
    return result


def carried_out(rows: dict[str, tuple], given: dict, executor: Executor | None) -> Iterator[tuple[str, dict]]:
    """Method -> what `carry_out` returns, in the order in which they end; an executor begins with the longest."""
    if executor is None:
        yield from ((key, carry_out(*row, **given)) for key, row in rows.items())
        return
    longest = sorted(rows, key=lambda key: (rows[key][0].kept, rows[key][0].trained), reverse=True)
    futures = {executor.submit(carry_out, *rows[key], **given): key for key in longest}
    yield from ((futures[future], future.result()) for future in as_completed(futures))


def carry_out(
    method: Method,
    folder: Path,
    home: Path,
    rate: float | None,
    *,
    samples: list[Sample],
    steps: int,
    seed: int,
    tests: dict[str, list[Sample]],
    shown: list[Sample],
    progress: bool,
) -> dict:
    """Merge, train, merge the adapter, examine.

    Args:
        folder: of the prior and the keep set.
        home: folder of what this method makes.
        rate: learning rate; None where nothing is trained.
        shown: samples whose answers are wanted word by word.

    Returns:
        `scores` by exam, `history` of the adapter, and `answers` to `shown`.
    """
    with one_thread(), quiet():
        base, history = VLM, []
        if method.merged:
            base = home / "base" if method.trained else home / "merged"
            task_arithmetic(VLM, EXPERT, method.merged, base)
        if method.trained:
            history = fine_tune(
                base,
                ReasoningPrior.load(folder / PRIOR),
                samples,
                home / "adapter",
                rate=rate,
                drift=method.drift,
                keep_set=folder / KEPT if method.kept else None,
                steps=steps,
                seed=seed,
                title=method.title,
                progress=progress,
            )
            merge_adapter(base, home / "adapter", home / "merged", overwrite=True, progress=False)
            base = home / "merged"
        model, processor = load(base)
        scores = examine(model, processor, tests, progress)
        return {"scores": scores, "history": history, "answers": ask(model, processor, shown)}


def results_of(rows: dict[str, dict], rates: dict[str, float], shown: list[Sample]) -> dict:
    """What results.json says of each method, from what `carry_out` has returned for it."""
    trained = [key for key in rows if METHODS[key].trained]
    examples = [
        {
            "symbols": sample.symbols,
            "answer": sample.answer,
            "answers": {key: row["answers"][i] for key, row in rows.items()},
            "right": {key: is_right(sample, row["answers"][i]) for key, row in rows.items()},
        }
        for i, sample in enumerate(shown)
    ]
    return {
        "titles": {key: METHODS[key].title for key in rows},
        "rates": {key: rates[key] for key in trained},
        "scores": {key: row["scores"] for key, row in rows.items()},
        "history": {key: rows[key]["history"] for key in trained},
        "examples": examples,
    }


def unlabelled(digits: Digits, seed: int) -> list:
    """Images of the world that nobody has labelled."""
    rng = np.random.default_rng([seed, 3])
    return [sample.image for sample in make_samples(KEEP_SET["samples"], ["read"], rng, digits)]


def study(seeds: Sequence[int] = (0, 1, 2), out: str | Path | None = None, **settings) -> list[dict]:
    """`run` for several seeds; prints means and, behind ±, standard deviations over the seeds."""
    folders = [None if out is None else Path(out, f"seed{seed}") for seed in seeds]
    check_folder(out, STUDY, [STUDY])
    for folder in folders:
        check_folder(folder)
    results = [run(folder, seed, show=False, **settings) for seed, folder in zip(seeds, folders, strict=True)]
    print_table(results)
    if out is not None:
        write_text(Path(out, STUDY), json.dumps(results, indent=2) + "\n")
    return results


def print_table(results: list[dict]) -> None:
    """One row per method: accuracy in percent, and learning rate."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    title = f"Right answers in percent on {results[0]['split']} digits, {results[0]['size']} per exam, seed {seeds}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for head in (*MEASURES.values(), "mean", "rate"):
        table.add_column(head, justify="right")
    for key in results[0]["scores"]:
        rows = np.array([[result["scores"][key][measure] for measure in MEASURES] for result in results])
        rows = 100 * np.column_stack([rows, rows.mean(1)])
        cells = [f"{mean:.0f}" for mean in rows.mean(0)]
        if len(results) > 1:
            cells = [f"{cell} ± {spread:.0f}" for cell, spread in zip(cells, rows.std(0, ddof=1), strict=True)]
        rate = results[0]["rates"].get(key)
        table.add_row(results[0]["titles"][key], *cells, "" if rate is None else f"{rate:g}")
    Console().print(table)


def learning_rates() -> dict[str, float]:
    """The rate that did best on validation digits, for every method that trains."""
    return json.loads(TUNING.read_text(encoding="utf-8"))["best"]


def check(methods: list[str], rates: dict[str, float]) -> None:
    """Refuse what cannot be run and name missing extras, before any work."""
    if unknown := [key for key in methods if key not in METHODS]:
        message = f"unknown method {unknown[0]!r}: choose from {', '.join(METHODS)}"
        raise ValueError("; ".join(filter(None, (message, nearest(unknown[0], METHODS)))))
    if unrated := [key for key in methods if METHODS[key].trained and key not in rates]:
        raise ValueError(f"rates name no learning rate of {unrated[0]!r}, which trains")
    if missing := [name for module, name in EXTRAS.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(f'the demo needs {", ".join(missing)}: pip install "drift_peft[demo]"')


def check_folder(
    out: str | Path | None, results: str = RESULTS, written: Iterable[str] = (PRIOR, KEPT, RESULTS, *PICTURES, *METHODS)
) -> None:
    """FileExistsError for a folder that holds what would be `written`, unless its `results` are those of a run;
    ValueError for an empty name, which would be the folder that one is in."""
    if out is not None and not os.fspath(out):
        raise ValueError("output is empty: name a folder (--out)")
    if out is None or not os.path.lexists(out):
        return
    if not os.path.isdir(out):
        raise FileExistsError(f"output {out} is no folder: name another one (--out)")
    held = {*os.listdir(out)}
    theirs = [name for name in written if name in held]
    if theirs and not is_of_a_run(Path(out, results)):
        raise FileExistsError(
            f"output {out} holds {theirs[0]} and is no folder of an earlier demo, so nothing in it is replaced: name "
            "another folder (--out)"
        )


def _written(folder: Path) -> list[Path]:
    """What of a run lies there, apart from its results."""
    return [folder / name for name in (PRIOR, KEPT, *METHODS, *PICTURES) if os.path.lexists(folder / name)]


def is_of_a_run(results: Path) -> bool:
    """Whether a file holds what a run has written of itself, or several have, in the end or at their start."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = found if isinstance(found, list) else [found]
    return all(isinstance(run, dict) and run.keys() in (BEGUN, BEGUN | DONE) for run in found)


@contextmanager
def working_folder(out: str | Path | None):
    """`out`, made if needed, or a temporary folder."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"output {out} cannot be made: {error.strerror}; name another folder (--out)") from error
        yield Path(out)


@contextmanager
def quiet():
    """Only our own progress bars and errors."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Switched off bitsandbytes", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
