"""Will a recipe fit the card? An estimate from the recipe and its base's configuration, and what to change if not."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig, TrainingArguments

from ..arguments import nearest
from ..checkpoints import folder_of, read_config, refuse_quantized
from ..recipe import as_meant, check_value, read_recipe
from .dry_run import MEASURE
from .images import warn_of_unread
from .memory import KEEPING, Estimate, Memory, Settings, fixed_tokens, kept, optimizer_state, patches
from .processor import with_processor
from .recipe_settings import OWN, check_recipe, value_of

CARDS = 8, 12, 16, 24  # GB
CHECKPOINTING = "gradient_checkpointing", "activation_checkpointing"  # the old name and the new one
USABLE = 0.94  # of a card; the rest goes to the desktop, and to gaps between tensors
FEWEST_TOKENS, FEWEST_RANKS, FEWEST_PIXELS = 512, 8, 512 * 512  # what advice goes down to; tokens beside the images'
# TRL's own keys, which decide nothing here. It is not imported, since a recipe is looked at before TRL is installed.
# Where it is, its own may be more: see trl_keys.
TRL = ("activation_offloading assistant_only_loss chat_template_path completion_only_loss dataset_kwargs "
       "dataset_num_proc dataset_text_field eos_token eval_packing loss_type max_length packing "
       "packing_strategy pad_to_multiple_of pad_token padding_free router_aux_loss_coef shuffle_dataset "
       "truncation_mode trust_remote_code").split()  # fmt: skip


def trl_keys() -> set[str]:
    """TRL's own keys: those known here, and those that the installed one has."""
    return {*TRL, *_trl_fields()}


def trl_choices() -> dict[str, list]:
    """What the installed TRL says that a key of its own may be, where that is one of a few."""
    choices = {}
    for name, line in _trl_fields().items():
        for node in (node for node in ast.walk(line) if isinstance(node, ast.Dict)):
            said = {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            if "choices" in said:
                choices[name] = ast.literal_eval(said["choices"])
    return choices


def _trl_fields() -> dict[str, ast.AnnAssign]:
    """Those of the installed TRL's settings, read from its source without an import, which takes seconds."""
    spec = find_spec("trl")
    trainer = Path(spec.origin).with_name("trainer") if spec and spec.origin else Path("nowhere")
    lines = []
    for file in filter(Path.is_file, (trainer / "sft_config.py", trainer / "base_config.py")):
        classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        lines += [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id: line for line in lines if isinstance(line.target, ast.Name)}


def recipe_keys() -> set[str]:
    """All that a recipe may have."""
    training = {field.name for field in fields(TrainingArguments)}
    return {*decisive_keys(), *OWN, *trl_keys(), *training}


def decisive_keys() -> dict[str, object]:
    """What decides what memory a recipe takes -> its type. An older transformers has one name of these two alone."""
    hints = get_type_hints(Settings)
    if not hasattr(TrainingArguments, CHECKPOINTING[1]):
        del hints[CHECKPOINTING[1]]
    return hints


def read_settings(recipe: str | Path, changes: dict | None = None) -> Settings:
    """The settings of a recipe; `changes` win over the file.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: it is no recipe, or has a key or a value that training does not take.
    """
    content = read_recipe(recipe)
    base = (content | (changes or {})).get("base")
    if base is not None:
        check_value("base", base, str)
    if not base:
        raise ValueError(f"{recipe} is no recipe: it names no base, such as base: Qwen/Qwen2.5-VL-7B-Instruct")
    keys = recipe_keys()
    for key in content:
        if key not in keys:
            way_out = nearest(key, sorted(keys)) or "take it out"
            raise ValueError(f"{recipe} has the key {key}, which no recipe has: {way_out}")
    known = decisive_keys()
    for key in set(changes or {}) - set(known):
        way_out = nearest(key, known) or f"what decides it is {', '.join(known)}"
        raise ValueError(f"{key} does not decide what memory a recipe takes; {way_out}")
    content |= changes or {}
    check_recipe(content, trl_choices())
    for key in (f"{name}_kwargs" for name in CHECKPOINTING):
        kwargs = as_meant(key, content.get(key), dict)
        if isinstance(kwargs, dict) and kwargs.get("every_n_layers", 1) != 1:
            some = f"every_n_layers: {kwargs['every_n_layers']}"
            raise ValueError(f"what {some} in {key} takes is not counted: leave it out, or {MEASURE}")
    return Settings(**{name: value_of(name, content[name], hint) for name, hint in known.items() if name in content})


def base_config(base: str) -> PretrainedConfig:
    """The config of a model, of which nothing else is downloaded.

    Raises:
        FileNotFoundError, OSError: there is no such model, or no config.json in it.
        ValueError: it cannot be read, or is quantized.
    """
    folder = folder_of(base, None, ("config.json", "adapter_config.json"))
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{base} is an adapter, not a model: name the model that it was trained on")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{base} has no config.json: give the folder that save_pretrained wrote, or a hub id")
    config = read_config(folder, base)
    refuse_quantized(config, base)
    return config


def fits(estimate: Estimate, card: float) -> bool:
    return estimate.bytes <= USABLE * card * 1e9


def verdict(estimate: Estimate, card: float) -> dict:
    return {"gb": card, "usable_gb": USABLE * card, "fits": fits(estimate, card)}


def advise(memory: Memory, now: Estimate, card: float) -> dict:
    """The one change after which least is taken, what that is, and whether it fits; alone, and with all others.

    max_tokens is lowered no further than needed, nor so far that the images that are cut into most tiles would go. What
    cannot be the least, or cannot fit, is not estimated.
    """
    settings = now.settings
    fewest = min(FEWEST_TOKENS + fixed_tokens(memory.config, settings), settings.max_tokens)
    changes = dict(_changes(settings))
    limit, tried = USABLE * card * 1e9, {}
    if fewest < settings.max_tokens:
        tried["max_tokens"] = _fewer_tokens(memory, now, fewest, limit)
    for name, value in changes.items():
        changed = replace(settings, **{name: value})
        if memory.least(changed, now) <= min((other.bytes for other in tried.values()), default=math.inf):
            tried[name] = memory.estimate(changed)
    if not tried:
        return {"setting": None, "fits_with_all": False}
    best = min((name for name in (*changes, "max_tokens") if name in tried), key=lambda name: tried[name].bytes)
    together = replace(settings, **changes, max_tokens=fewest)
    possible = memory.least(together, now) <= limit
    return {
        "setting": best,
        "value": getattr(tried[best].settings, best),
        "total_gb": tried[best].bytes / 1e9,
        "fits": fits(tried[best], card),
        "all": {**changes, "max_tokens": fewest},
        "fits_with_all": fits(tried[best], card) or (possible and fits(memory.estimate(together), card)),
    }


def _changes(settings: Settings) -> Iterator[tuple[str, object]]:
    """Settings that take less, and the value that takes least."""
    if not settings.checkpoints:
        yield CHECKPOINTING[settings.activation_checkpointing is not None], True
    if settings.per_device_train_batch_size > 1:
        yield "per_device_train_batch_size", 1
    if settings.label_smoothing_factor:
        yield "label_smoothing_factor", 0.0
    if settings.think_tokens:
        yield "think_tokens", False
    if settings.drift_norm == "weight" and settings.steering_rank:
        yield "drift_norm", "factor"
    if optimizer_state(settings) > optimizer_state(replace(settings, optim="paged_adamw_8bit")):
        yield "optim", "paged_adamw_8bit"
    if settings.r > FEWEST_RANKS:
        yield "r", FEWEST_RANKS
    kwargs = settings.processor_kwargs or {}
    if (kwargs.get("max_pixels") or 0) > FEWEST_PIXELS:
        yield "processor_kwargs", {**kwargs, "max_pixels": FEWEST_PIXELS}


def _fewer_tokens(memory: Memory, now: Estimate, fewest: int, limit: float) -> Estimate:
    """What fits with as many tokens as there can be, in steps of 256; else with the fewest."""
    least = memory.estimate(replace(now.settings, max_tokens=fewest))
    estimate = now if least.bytes <= limit else least
    while estimate.bytes > limit and estimate is not least:  # memory is nearly linear in the tokens
        share = (limit - least.bytes) / (estimate.bytes - least.bytes)
        tokens = fewest + int(share * (estimate.settings.max_tokens - fewest)) // 256 * 256
        estimate = memory.estimate(replace(now.settings, max_tokens=tokens))
    return estimate


def preflight_summary(recipe: str | Path, changes: dict | None = None) -> dict:
    """The estimate for a recipe, and what each card needs changed. Of the base, its config.json and its processor's
    configuration are downloaded, and nothing else.

    Raises:
        FileNotFoundError, OSError: there is no such recipe or base, or the hub does not give it.
        ValueError: a setting is wrong, or the base is no full-precision vision-language model.
    """
    return estimate_summary(*read_base(read_settings(recipe, changes)))


def read_base(settings: Settings) -> tuple[Memory, Settings]:
    """The base of a recipe, and the settings with what its processor says of images.

    Raises: as `preflight_summary`.
    """
    memory = Memory(base_config(settings.base), settings.base)
    warn_of_unread(memory.config, settings.processor_kwargs)
    return memory, with_processor(settings, memory.config.model_type)


def estimate_summary(memory: Memory, settings: Settings) -> dict:
    now = memory.estimate(settings)
    cards = [verdict(now, card) for card in CARDS]
    for card in cards:
        if not card["fits"]:
            card["advice"] = advise(memory, now, card["gb"])
    without = memory.estimate(replace(settings, keep=None)) if settings.keeps else now
    return {
        "base": now.settings.base,
        "settings": {key: value for key, value in asdict(now.settings).items() if key != "base"},
        "patches": patches(memory.config, settings),
        **now.summary(),
        "keeping": _keeping(memory, settings, (now.bytes - without.bytes) / 1e9),
        "cards": cards,
    }


def _keeping(memory: Memory, settings: Settings, gb: float) -> dict | None:
    """What keeping adds: tokens and time a step, as a share of a step on the task, and memory at the peak."""
    if settings.replay:
        return {"replay": settings.replay, "time": settings.replay / (1 - settings.replay), "gb": 0.0}
    if not settings.keeps:
        return None
    step, every = memory.keep_step(settings), settings.keep_every
    samples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    time = settings.keep_batch_size * step.tokens / (samples * settings.max_tokens) / every
    at_once = {"samples": step.batch, "tokens": step.tokens, "patches": patches(memory.config, kept(settings))}
    return {**at_once, "step_samples": samples, "every": every, "time": time, "gb": gb}


def keeping_sentence(summary: dict) -> str:
    """What keeping adds to a step, in words; empty where nothing is kept."""
    keeping, settings = summary["keeping"], summary["settings"]
    if keeping is None:
        return ""
    if settings["replay"]:
        return f"replay: {keeping['replay']:g} takes {keeping['time']:.0%} more steps an epoch, and no more memory"
    often = "each step" if keeping["every"] == 1 else f"every {keeping['every']} steps"
    return (
        f"keeping takes {settings['keep_batch_size']} x {keeping['tokens']} tokens at most {often}, beside "
        f"{keeping['step_samples']} x {settings['max_tokens']} of the task: {keeping['time']:.0%} more time, or more "
        f"where the task's samples are shorter, and {keeping['gb']:.2f} GB more at the peak"
    )


def preflight_table(summary: dict) -> Table:
    """The parts of the estimate."""
    settings, keeping = summary["settings"], summary["keeping"]
    samples, tokens = settings["per_device_train_batch_size"], settings["max_tokens"]
    images, cut = settings["images_per_sample"], summary["patches"]
    if summary["moment"].endswith(KEEPING):
        samples, tokens, images, cut = keeping["samples"], keeping["tokens"], 1, keeping["patches"]
    caption = (
        f"at its peak, the {summary['moment']}: {samples} x {tokens} tokens, each with {images} "
        f"image{'s' * (images > 1)} of at most {cut} patches"
    )
    return parts_table(summary, f"training {summary['base']}", caption)


def parts_table(summary: dict, title: str, caption: str) -> Table:
    """What there is of each part, in GB, and their sum."""
    table = Table("part", "GB", title=Text(title), caption=Text(caption))
    table.columns[1].justify = "right"
    for part, size in summary["parts_gb"].items():
        if size:
            table.add_row(Text(part), f"{size:.2f}")
    table.add_section()
    table.add_row("all", f"{summary['total_gb']:.2f}")
    return table


def cards_table(summary: dict) -> Table:
    """Which cards it fits, and what to change for the others."""
    table = Table("card", "usable", "verdict", caption=f"usable: {USABLE:.0%} of a card")
    for card in summary["cards"]:
        table.add_row(f"{card['gb']} GB", f"{card['usable_gb']:.1f} GB", Text(_verdict(card, summary["total_gb"])))
    return table


def _verdict(card: dict, total: float) -> str:
    if card["fits"]:
        return f"fits, with {card['usable_gb'] - total:.1f} GB to spare"
    advice = card["advice"]
    if not advice["fits_with_all"]:
        return "fits no card of this size at any of these settings"
    change = f"{advice['setting']}: {advice['value']}"
    if advice["fits"]:
        return f"does not fit; with {change} it does ({advice['total_gb']:.1f} GB)"
    every = ", ".join(f"{name}: {value}" for name, value in advice["all"].items())
    return f"does not fit; {change} helps most ({advice['total_gb']:.1f} GB), and enough is only {every}"
