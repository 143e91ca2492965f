"""The model card of an adapter, filled in: what it was trained from, toward what and how, and how others use it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import in_markdown
from .settings import DriftSettings

START, END = "<!-- drift_peft{name}: this section is written anew at every save -->", "<!-- /drift_peft -->"
BEYOND = "what {expert} has beyond the language model of {base}"
METHODS = {  # what the guidance did
    "gradient": f"at each optimizer step the gradient of the adapter was biased toward {BEYOND}",
    "factors": f"after each optimizer step the adapter went a part of the way to {BEYOND}",
    "base": "after each optimizer step the adapter was drawn back, which holds the model near {base}",
}
SHOWN = ("alpha", "scale", "target", "rank", "norm", "spectrum", "modules", "alpha_pattern")
SHOWN += ("warmup_steps", "decay_steps")

SECTION = """\
{start}
# LoRA adapter {name}for {base}{toward}

Trained {method}. The adapter itself is plain LoRA.

| | |
|---|---|
{rows}

## Use

With PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(vlm, "{adapter}"{subfolder})  # vlm is {base}
```
{merged}
As a model of its own, in the base's precision:

```
drift-peft merge --base {base_argument} --adapter {folder} -o merged --verify
```
{end}
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
    if not path.is_file():
        path, name = folder.parent / "README.md", folder.name
        if not path.is_file() or ModelCard.load(path).data.library_name != "peft":
            return
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.tags or []), "drift-peft", "lora"})
    section = _section(config, name)
    marked = re.compile(re.escape(_start(name)) + ".*?" + re.escape(END) + "\n?", re.DOTALL)
    if marked.search(card.text):
        card.text = marked.sub(lambda _: section, card.text)
    else:
        template = ModelCard.from_template(ModelCardData()).text
        card.text = f"{section}\n{card.text.removeprefix(template).lstrip()}"
    temporary = path.with_suffix(".tmp")
    card.save(temporary)
    os.replace(temporary, path)


def _start(name: str | None) -> str:
    return START.format(name=f", adapter {name}" if name else "")


def _section(config: DriftSettings, name: str | None) -> str:
    named = config.base_model_name_or_path or "its base model"
    base, expert = in_markdown(named), in_markdown(config.expert or "a text-only reasoning model")
    words = config.merged and in_markdown(config.merged.words)
    table = {"base": base if config.merged is None else f"{base}, which is {words}"}
    if config.prior or config.guides:
        table["expert"] = in_markdown(config.expert or "not recorded")
        digest = (config.prior_sha256 or "not recorded")[:16]
        table["prior"] = in_markdown(f"{config.prior} (SHA-256 {digest})") if config.prior else "none"
    table["training data"] = in_markdown(config.trained_on or "not recorded")
    rslora = ", rank-stabilized" if config.use_rslora else ""
    table["LoRA"] = f"r = {config.r}, alpha = {config.lora_alpha}{rslora}"
    if config.guides:
        method = METHODS[config.drift_target if config.drift_scale == "decoupled" else "gradient"]
        method = "with [DRIFT](https://arxiv.org/abs/2510.15050): " + method
        table |= {"guidance": in_markdown(_guidance(config)), "guided optimizer steps": int(config.drift_steps)}
    else:
        method = f"by plain LoRA fine-tuning, without {'a prior' if config.prior is None else 'guidance'}"
        method += f", from a start in the main directions of {BEYOND}" if config.init_lora_weights == "drift" else ""
    argument = shlex.quote(" ".join(named.split()))
    merged = config.merged and MERGED.format(words=words, command=config.merged.command, base=argument)
    return SECTION.format(
        start=_start(name),
        end=END,
        name=f"{name} " if name else "",
        toward=f", steered toward {expert}" if config.pulls else "",
        method=method.format(base=base, expert=expert),
        base=base,
        base_argument=argument,
        rows="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        merged=merged or "",
        adapter="path/or/hub-id",
        subfolder=f', subfolder="{name}"' if name else "",
        folder=f"path/{name}" if name else "path/or/hub-id",
    )


def _guidance(config: DriftSettings) -> str:
    settings = {name: getattr(config, f"drift_{name}") for name in SHOWN}
    defaults = {name: type(config).__dataclass_fields__[f"drift_{name}"].default for name in SHOWN}
    told = [f"{name} = {value}" for name, value in settings.items() if value not in (defaults[name], {})]
    guidance = [f"{settings['scale']} toward {settings['target']}, strength {settings['alpha']}"]
    return ", ".join([*guidance, *(text for text in told if text.split(" = ")[0] not in ("scale", "target", "alpha"))])
