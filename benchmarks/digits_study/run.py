"""One run: make the model, train it, examine it. Everything that a run depends on is in its settings."""

from __future__ import annotations

import gc
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, set_seed

from drift_peft import DriftConfig, ReasoningPrior, guide, keep, language_model_targets, merge_adapter
from drift_peft.checkpoints import Checkpoint, canonical_name, module_kind
from drift_peft.demo.compare import quiet
from drift_peft.demo.evaluate import ask, encode, exams, is_right
from drift_peft.demo.train import load, task_arithmetic
from drift_peft.demo.world import PERCEPTION, Sample, make_samples
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.merge import merge_baseline

from .keep_sets import keep_set_of, replayed
from .methods import METHODS, Method
from .worlds import WORLDS, World

BATCH = 16
DEFAULTS = {"r": 8, "steps": 150, "samples": 200, "noise": 0.0, "merged": 0.0, "size": 300}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def perform(run: dict, priors: Path) -> dict:
    """Carry out a run; `priors` is the folder of `make_priors`.

    Args:
        run: `world`, `method`, `seed`, `split` and `settings`, which go over the method's and DEFAULTS.

    Returns:
        `answers`: exam -> one hexadecimal digit per four answers, 1 where right; `loss`: means over tenths of the
        training; `cosine` and `absorbed`: of W − W_vlm against Δ, all projections together; `step_seconds`,
        `seconds` and `peak_mb`, by how much resident memory grew.
    """
    start = time.perf_counter()
    world, method = WORLDS[run["world"]], METHODS[run["method"]]
    settings = DEFAULTS | method.settings | run["settings"]
    prior = priors / f"{run['world']}-{method.prior}.safetensors"
    memory = PeakMemory()
    measured: dict = {}
    set_seed(run["seed"])
    with quiet(), tempfile.TemporaryDirectory() as home:
        if method.trains:
            model, processor = trained(world, method, settings, run["seed"], prior, Path(home), measured)
        else:
            model, processor = merged(world, method, settings, run["seed"], prior, Path(home))
        measured["peak_mb"] = memory.grown()
        measured |= movement(model, world)
        tests = exams(run["split"], run["seed"], settings["size"], world.digits)
        answers = {name: marks(model, processor, samples) for name, samples in tests.items()}
    return {"answers": answers, **measured, "seconds": round(time.perf_counter() - start, 1)}


# Training


def trained(world: World, method: Method, settings: dict, seed: int, prior: Path, home: Path, measured: dict):
    folder = world.vlm
    if settings["merged"]:
        folder = home / "base"
        if method.prior == "hierarchical":
            given = {"reference": world.base, "scale": settings["merged"], "progress": False}
            merge_baseline("task_arithmetic", world.expert, world.vlm, folder, **given)
        else:
            task_arithmetic(world.vlm, world.expert, settings["merged"], folder)
    model, processor = load(folder, four_bit=method.four_bit)
    samples = training_samples(world, settings, seed)
    drift = None if method.drift is None else method.drift | chosen(settings, "drift_")
    if method.trains == "full":
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(module_kind(canonical_name(name) or "") in ("attn", "mlp", "norm", "bias"))
        if drift is not None:
            guide(model, str(prior), **drift)
    else:
        model = adapted(model, processor, method, settings, drift, prior, samples)
    if method.kept:
        keep_set = keep_set_of(world, settings, seed, samples, prior.parent)
        if method.kept == "replay":
            samples = samples + replayed(keep_set)
        else:
            how = {name: settings[f"keep_{name}"] for name in ("weight", "batch_size", "every")}
            keep(model, keep_set, processor, seed=seed, **how)
    train(model, processor, samples, settings, seed, measured)
    if method.four_bit:
        model.save_pretrained(home / "adapter")
        merge_adapter(folder, home / "adapter", home / "merged", progress=False)
        model, _ = load(home / "merged")
    elif method.trains == "lora":
        model = model.merge_and_unload()
    return model, processor


def adapted(model, processor, method: Method, settings: dict, drift: dict | None, prior: Path, samples: list[Sample]):
    """The model with its adapter, and whatever its start needs to see."""
    saved = NORMS if "norm" in (drift or {}).get("drift_modules", ()) else None
    lora = dict(
        r=settings["r"],
        lora_alpha=2 * settings["r"],  # scaling 2 at any rank
        target_modules=language_model_targets(model),
        modules_to_save=saved,
        task_type="CAUSAL_LM",
    )
    if drift is not None:
        needed = None if drift.get("drift_target") == "base" else str(prior)
        return get_peft_model(model, DriftConfig(prior=needed, **lora, **drift))
    keep_4bit_differentiable(model)
    config = LoraConfig(init_lora_weights=method.start, **lora)
    batches = [dict(encode(processor, samples[i : i + BATCH])) for i in range(0, min(len(samples), 4 * BATCH), BATCH)]
    if method.start == "lora_ga":
        from peft import LoraGAConfig, preprocess_loraga  # not in the oldest versions

        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
        model.zero_grad()
    model = get_peft_model(model, config)
    if method.start == "eva":
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def train(model, processor, samples: list[Sample], settings: dict, seed: int, measured: dict) -> None:
    """AdamW with a cosine schedule and clipping at 1, as Trainer's defaults."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, settings["steps"])
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(samples, BATCH, shuffle=True, generator=order, collate_fn=partial(encode, processor))
    model.train()
    losses, seconds = [], []
    while len(losses) < settings["steps"]:
        for batch in loader:
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            if len(losses) == settings["steps"]:
                break
    measured["loss"] = [round(float(part.mean()), 4) for part in np.array_split(losses, 10) if len(part)]
    measured["step_seconds"] = round(float(np.median(seconds)), 4)


def training_samples(world: World, settings: dict, seed: int) -> list[Sample]:
    """Images of two and three operations; fewer samples are the first of more; the share `noise` has wrong chains.

    With `chains` "text" they are shown as text, and `operations` says how many a chain has.
    """
    digits = None if settings.get("chains") == "text" else world.digits("train")
    operations = settings.get("operations", (2, 3))
    drawn = make_samples(400, ["solve"], np.random.default_rng([seed, 1]), digits, operations)
    rng = np.random.default_rng([seed, 3])
    wrong = rng.permutation(settings["samples"])[: round(settings["noise"] * settings["samples"])]
    samples = drawn[: settings["samples"]]
    for i in wrong:
        results = iter(rng.integers(10, size=8))
        answer = re.sub(r"=\d", lambda _, results=results: f"={next(results)}", samples[i].answer)
        answer = re.sub(r"\{\d", lambda _, answer=answer: "{" + re.findall(r"=(\d)", answer)[-1], answer)
        samples[i] = Sample("solve", samples[i].symbols, samples[i].question, answer, samples[i].image)
    return samples


# Without training


def merged(world: World, method: Method, settings: dict, seed: int, prior: Path, home: Path):
    if method.merge is None:
        return load(world.vlm)
    if method.merge == "export":
        ReasoningPrior.load(prior).truncate(settings["r"], home / "prior.safetensors").as_lora(
            settings["scale"], home / "adapter"
        )
        model, processor = load(world.vlm)
        return PeftModel.from_pretrained(model, home / "adapter").merge_and_unload(), processor
    given = chosen(settings, "scale", "weights", "density", "only_layers")
    reference = world.base if "weights" in given else None
    merge_baseline(
        method.merge, world.expert, world.vlm, home / "merged", reference, seed=seed, progress=False, **given
    )
    return load(home / "merged")


# Measuring


def marks(model, processor, samples: list[Sample]) -> str:
    """One hexadecimal digit per four answers, the first answer in its highest bit; 1 where right."""
    right = [is_right(sample, text) for sample, text in zip(samples, ask(model, processor, samples), strict=True)]
    return np.packbits(right).tobytes().hex()


def unmarked(text: str, size: int) -> np.ndarray:
    """The answers [size] that `marks` has written: 1.0 where right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:size].astype(float)


def scores(result: dict, size: int) -> dict[str, np.ndarray]:
    """Exam -> answers [size]; `perception` is the mean of its three tasks, sample by sample."""
    answers = {name: unmarked(text, size) for name, text in result["answers"].items()}
    perception = np.mean([answers.pop(task) for task in PERCEPTION], axis=0)
    return {**answers, "perception": perception}


def movement(model, world: World) -> dict[str, float]:
    """How far the projections went toward Δ: cosine of W − W_vlm with Δ, and ⟨W − W_vlm, Δ⟩/‖Δ‖²."""
    vlm, expert = Checkpoint(world.vlm), Checkpoint(world.expert)
    inner = moved = delta = 0.0
    for name, parameter in model.named_parameters():
        canonical = canonical_name(name)
        if canonical and module_kind(canonical) in ("attn", "mlp"):
            W0 = vlm.tensor(vlm.language_model[canonical]).float()
            M, D = parameter.detach() - W0, expert.tensor(expert.language_model[canonical]).float() - W0
            inner, moved, delta = (
                inner + (M * D).sum().item(),
                moved + (M * M).sum().item(),
                delta + (D * D).sum().item(),
            )
    return {"cosine": round(inner / (moved * delta) ** 0.5, 4) if moved else 0.0, "absorbed": round(inner / delta, 4)}


def chosen(settings: dict, *prefixes: str) -> dict:
    return {key: value for key, value in settings.items() if key.startswith(prefixes)}


class PeakMemory:
    """By how much this process's resident memory has grown at most; Linux alone knows."""

    def __init__(self):
        gc.collect()
        self.known = sys.platform == "linux"
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.start = self.read()

    @staticmethod
    def read() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def grown(self) -> float | None:
        return round((self.read() - self.start) / 1024, 1) if self.known else None
