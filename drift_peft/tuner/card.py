"""The model card of an adapter, filled in: what it was trained from, toward what and how, and how others use it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForImageTextToText
from yaml import YAMLError

from ..atomic import write
from ..checkpoints import TASK, how_to_load, how_to_serve, hub_id, in_markdown, shown
from ..prior import MergedDelta
from ..warn import warn
from .settings import DriftSettings

START, END = "<!-- drift_peft{name}: this section is written anew at every save -->", "<!-- /drift_peft -->"
BEYOND = "what {expert} has beyond the language model of {base}"
METHODS = {  # what the guidance did
    "gradient": f"at each optimizer step the gradient of the adapter was biased toward {BEYOND}",
    "factors": f"after each optimizer step the adapter went a part of the way to {BEYOND}",
    "base": "after each optimizer step the adapter was drawn back, which holds the model near {base}",
}
SHOWN = ("rank", "norm", "spectrum", "modules", "alpha_pattern", "warmup_steps", "decay_steps")

SECTION = """\
{start}
# LoRA adapter {name}for {base}{toward}

Trained {method}. The adapter itself is plain LoRA.

| | |
|---|---|
{rows}

{picture}## Use

With PEFT alone:

{load}
{merged}
{serve}
{end}
"""

PICTURE = "telemetry.png"  # what the recipes call it
SHOWN_PICTURE = f"""\
## Training

![Loss, and where the adapter stands against Δ, step by step]({PICTURE})

"""
MERGED = """
The adapter belongs to this base, to {words}, and to no other. To make it again:

```
{command} -o {base}
```
"""


def update_card(folder: Path, config: DriftSettings) -> None:
    """Fill in the README.md that PEFT has written into an adapter's folder, or above it if the adapter has a name.

    The template that PEFT starts from is replaced where nobody has filled in anything; of every other card only the
    section between our two markers is. Its metadata stays, with the tag `drift-peft` added. A folder without a card
    gets none.
    """
    path, name = folder / "README.md", None
    if path.is_file():
        card = _read_card(path)
        if card is None:
            warn(f"{path} is no model card, since its metadata cannot be read, and stays as it is.")
    else:
        path, name = folder.parent / "README.md", folder.name
        card = _read_card(path)
        if card is not None and card.data.library_name != "peft":
            card = None
    if card is None:
        return
    if isinstance(base := card.data.get("base_model"), str) and hub_id(base) is None:  # as Trainer and TRL write it
        card.text = card.text.replace(f"[{base}](https://huggingface.co/{base})", shown(base))
    _fill_in(card.data, config)
    section = _section(config, name, (path.parent / PICTURE).is_file())
    marked = re.compile(re.escape(_start(name)) + ".*?" + re.escape(END) + "\n?", re.DOTALL)
    if marked.search(card.text):
        card.text = marked.sub(lambda _: section, card.text)
    else:
        template = ModelCard.from_template(ModelCardData()).text
        card.text = f"{section}\n{card.text.removeprefix(template).lstrip()}"
    write(path, card.save)


def _read_card(path: Path) -> ModelCard | None:
    """None where there is none, or it cannot be read as one, such as a README of something else."""
    try:
        return ModelCard.load(path) if path.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None


def _fill_in(data: ModelCardData, config: DriftSettings) -> None:
    """What the hub reads: the task, and models by their hub ids alone, since PEFT writes the path of a local base."""
    tags = {tag for tag in data.tags or [] if not tag.startswith("base_model:")} | {"drift-peft", "lora"}
    if isinstance(base := data.get("base_model"), str):
        data["base_model"] = hub_id(base)
        tags |= {f"base_model:adapter:{hub_id(base)}"} if hub_id(base) else set()
    data["tags"] = sorted(tags)
    if config.loaded_by == AutoModelForImageTextToText.__name__ and data.pipeline_tag in (None, "text-generation"):
        data["pipeline_tag"] = TASK


def _start(name: str | None) -> str:
    return START.format(name=f", adapter {name}" if name else "")


def _section(config: DriftSettings, name: str | None, picture: bool) -> str:
    named = shown(config.base_model_name_or_path or "its base model")
    base, expert = in_markdown(named), in_markdown(config.expert or "a text-only reasoning model")
    merged = config.merged and _without_paths(config.merged)
    words = merged and in_markdown(merged.words)
    table = {"base": base if merged is None else f"{base}, which is {words}"}
    if config.prior or config.guides:
        table["expert"] = in_markdown(config.expert or "not recorded")
        digest = (config.prior_sha256 or "not recorded")[:16]
        table["prior"] = in_markdown(f"{shown(config.prior)} (SHA-256 {digest})") if config.prior else "none"
    table["training data"] = in_markdown(shown(config.trained_on) if config.trained_on else "not recorded")
    if config.training is not None:
        table["training"] = config.training
    rslora = ", rank-stabilized" if config.use_rslora else ""
    dropout = f", dropout = {config.lora_dropout:g}" if config.lora_dropout else ""
    table["LoRA"] = f"r = {config.r}, alpha = {config.lora_alpha}{rslora}{dropout}"
    if config.modules_to_save:
        table["trained in full"] = in_markdown(", ".join(config.modules_to_save))
    if config.quantization:
        quantized = filter(None, (config.quantization.get(key) for key in ("quant_method", "bnb_4bit_quant_type")))
        table["base in training"] = f"quantized: {' '.join(getattr(kind, 'value', kind) for kind in quantized)}"
    if config.keeping is not None:
        table["kept near"] = in_markdown(config.keeping)
    if config.guides:
        method = METHODS[config.drift_target if config.drift_scale == "decoupled" else "gradient"]
        method = "with [DRIFT](https://arxiv.org/abs/2510.15050): " + method
        if config.init_lora_weights == "drift":
            table["start"] = f"{config.drift_start:g} of Δ" if config.drift_start else "the main directions of Δ"
        table |= {"guidance": in_markdown(_guidance(config)), "guided optimizer steps": int(config.drift_steps)}
    else:
        method = f"by plain LoRA fine-tuning, without {'a prior' if config.prior is None else 'guidance'}"
        held = f"with {config.drift_start:g} of" if config.drift_start else "in the main directions of"
        method += f", from a start {held} {BEYOND}" if config.init_lora_weights == "drift" else ""
    argument = shlex.quote(" ".join(named.split()))
    again = merged and MERGED.format(words=words, command=merged.command, base=argument)
    adapter, folder = "path/or/hub-id", f"path/{name}" if name else "path/or/hub-id"
    return SECTION.format(
        start=_start(name),
        end=END,
        name=f"{name} " if name else "",
        toward=f", steered toward {expert}" if config.pulls else "",
        method=method.format(base=base, expert=expert),
        base=base,
        rows="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        picture=SHOWN_PICTURE if picture else "",
        load=how_to_load(named, base, config.loaded_by, adapter, name, config.revision),
        merged=again or "",
        serve=how_to_serve(named, config.loaded_by, folder, config.r if _is_even(config) else None, config.revision),
    )


def _is_even(config: DriftSettings) -> bool:
    """Is the adapter of one rank and one scaling, and nothing but factors? vLLM takes no other beside its base."""
    return not (config.rank_pattern or config.alpha_pattern or config.modules_to_save or config.bias != "none")


def _without_paths(merged: MergedDelta) -> MergedDelta:
    roles = {role: getattr(merged, role) for role in ("base", "expert", "reference")}
    return replace(merged, **{role: origin and {**origin, "id": shown(origin["id"])} for role, origin in roles.items()})


def _guidance(config: DriftSettings) -> str:
    parts = [f"{config.drift_scale} toward {config.drift_target}, strength {config.drift_alpha}"]
    for name in SHOWN:
        value, default = (getattr(settings, f"drift_{name}") for settings in (config, DriftSettings()))
        parts += [] if value == default else [f"{name} = {value}"]
    return ", ".join(parts)
