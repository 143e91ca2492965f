"""One run: make the model, train it on NF4, merge it, examine it. All that a run depends on is in its settings."""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from drift_peft import (
    DriftConfig,
    ReasoningPrior,
    build_prior,
    gate_prior,
    keep,
    language_model_targets,
    make_keep_set,
    merge_adapter,
)
from drift_peft.demo.evaluate import ask, encode
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.merge import merge_baseline

from .abilities import abilities
from .precision import autocast, compute_dtype, nf4
from .ways import WAYS, Way
from .world import KEEP_QUESTIONS, Pictures, Sample, draw_many, exams, is_right, text_chain

DEFAULTS = {"steps": 100, "samples": 200, "size": 100, "keep_images": 240, "r": 16}
BATCH, PRIOR_RANK = 8, 64


def perform(run: dict, folder: Path, device: torch.device) -> dict:
    """Carry out a run.

    Args:
        run: `way`, `seed`, `split` and `settings`, which go over DEFAULTS.
        folder: of `make_all`; priors and keep sets are added to it.

    Returns:
        `answers`: exam -> one hexadecimal digit per four answers, 1 where right; the language model's `perplexity`
        on prose and `kl` to the ancestor on general prompts; `loss`: means over tenths of the training;
        `seconds`.
    """
    start = time.perf_counter()
    way, settings = WAYS[run["way"]], DEFAULTS | run["settings"]
    measured: dict = {}
    set_seed(run["seed"])
    with tempfile.TemporaryDirectory() as home:
        merged = finished(way, settings, run["seed"], folder, Path(home), device, measured)
        model, processor = load(merged, device)
        right = {}
        for name, samples in exams(run["split"], run["seed"], settings["size"]).items():
            texts = ask(model, processor, samples, batch_size=50)
            right[name] = np.packbits([is_right(s, t) for s, t in zip(samples, texts, strict=True)]).tobytes().hex()
        measured |= abilities(model, processor.tokenizer, folder / "base")
    return {"answers": right, **measured, "seconds": round(time.perf_counter() - start, 1)}


def load(folder: Path, device: torch.device, four_bit: bool = False):
    """The model and its processor. `four_bit`: in NF4 and to be trained; SDPA would take longer then on a CPU."""
    training = {"quantization_config": nf4(device), "attn_implementation": "eager"} if four_bit else {}
    place = {"device_map": {"": device}}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=compute_dtype(device), **place, **training)
    return model, AutoProcessor.from_pretrained(folder)


def finished(way: Way, settings: dict, seed: int, folder: Path, home: Path, device, measured: dict) -> Path:
    """The folder of the model that is examined."""
    vlm, expert = folder / "vlm", folder / "expert"
    base, scale = vlm, settings.get("scale", way.merged)
    if scale:
        base, reference = home / "base", folder / "base" if way.ancestor else None
        merge_baseline("task_arithmetic", expert, vlm, base, reference, scale=scale, progress=False)
    if way.gated:
        adapter = gated_prior(way, settings, seed, folder, home, device).as_lora(1.0, home / "adapter")
        merge_adapter(vlm, adapter, home / "merged", progress=False)
        return home / "merged"
    if not way.trains:
        return base
    model, processor = load(base, device, four_bit=True)
    lora = dict(
        r=settings["r"],
        lora_alpha=2 * settings["r"],
        target_modules=language_model_targets(model),
        task_type="CAUSAL_LM",
    )
    if way.drift is None:
        keep_4bit_differentiable(model)
        config = LoraConfig(**lora)
    else:
        drift = way.drift | {name: value for name, value in settings.items() if name.startswith("drift_")}
        config = DriftConfig(prior=str(prior_of(folder, way.ancestor)), **lora, **drift)
    model = get_peft_model(model, config)
    if way.kept:
        keep(model, str(keep_set_of(folder, settings["keep_images"], device)), processor, seed=seed)
    train(model, processor, training_samples(settings["samples"], seed), settings, seed, measured)
    model.save_pretrained(home / "adapter")
    del model
    gc.collect()
    merge_adapter(base, home / "adapter", home / "merged", progress=False)
    return home / "merged"


def prior_of(folder: Path, ancestor: bool) -> Path:
    output = folder / f"prior{'-ancestor' if ancestor else ''}.safetensors"
    reference = folder / "base" if ancestor else None
    build_prior(
        folder / "expert", folder / "vlm", output, PRIOR_RANK, reference=reference, exist_ok=True, progress=False
    )
    return output


def gated_prior(way: Way, settings: dict, seed: int, folder: Path, home: Path, device) -> ReasoningPrior:
    """On the VLM in 16 bits, with other prompts for the expert than it was taught on."""
    rng = np.random.default_rng([seed, 5])
    texts = [text_chain(rng).question for _ in range(settings["samples"])]
    kept = keep_set_of(folder, settings["keep_images"], device)
    given = {name: settings[name] for name in ("keep_weight", "gate_steps") if name in settings}
    given = {name.removeprefix("gate_"): value for name, value in given.items()}
    sizes = {"max_new_tokens": 96, "batch_size": 8, "seed": seed, "progress": False}
    pair = prior_of(folder, way.ancestor), folder / "vlm", folder / "expert"
    return gate_prior(*pair, kept, texts, home / "gated.safetensors", **given, **sizes)


def keep_set_of(folder: Path, images: int, device: torch.device) -> Path:
    """The VLM's answers about images of every kind, whether the question fits the image or not."""
    output = folder / f"keep-{images}.safetensors"
    if not output.exists():
        model, processor = load(folder / "vlm", device)
        pictures = Pictures("train")
        shown = [s.image for s in draw_many(images, partial(pictures.draw, "describe"), (3,))]
        given = {"samples": images, "max_new_tokens": 24, "batch_size": 40, "processor": processor}
        make_keep_set(model, shown, output, KEEP_QUESTIONS, progress=False, **given)
    return output


def training_samples(count: int, seed: int) -> list[Sample]:
    """Images of two and three operations, with the chain of thought that the expert would write."""
    pictures = Pictures("train")
    return draw_many(count, lambda rng: pictures.draw("solve", rng, (2, 3)), (seed, 1))


def train(model, processor, samples: list[Sample], settings: dict, seed: int, measured: dict) -> None:
    """AdamW with a cosine schedule and clipping at 1, as Trainer's defaults."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, settings["steps"])
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(samples, BATCH, shuffle=True, generator=order, collate_fn=partial(encode, processor))
    model.train()
    losses = []
    while len(losses) < settings["steps"]:
        for batch in loader:
            with autocast(model.device):
                loss = model(**of_answers(batch).to(model.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == settings["steps"]:
                break
    measured["loss"] = [round(float(part.mean()), 4) for part in np.array_split(losses, 10) if len(part)]


def of_answers(batch):
    """Logits and labels of the longest answer and the place before it alone: logits are costly, and padding is left."""
    first, width = int((batch["labels"] != -100).any(dim=0).nonzero()[0]) - 1, batch["labels"].shape[1]
    batch["labels"] = batch["labels"][:, first:]
    batch["logits_to_keep"] = torch.arange(first, width)  # as in drift_peft.keeping.answers
    return batch
