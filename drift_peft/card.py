"""The model card of an adapter, filled in: what it was trained from, toward what and how, and how others use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    from .config import DriftConfig

START, END = "<!-- drift_peft: this section is written anew at every save -->", "<!-- /drift_peft -->"
UNTOUCHED = "[More Information Needed]"  # PEFT's template, which nobody has filled in
SHOWN = ("alpha", "scale", "target", "rank", "norm", "spectrum", "modules", "alpha_pattern")
SHOWN += ("warmup_steps", "decay_steps")

SECTION = """\
{start}
# LoRA adapter for {base}, steered toward {expert}

Trained with [DRIFT](https://arxiv.org/abs/2510.15050): at each optimizer step the gradient of the adapter was biased
toward what {expert} has beyond the language model of {base}. The adapter itself is plain LoRA.

| | |
|---|---|
| base | {base} |
| expert | {expert} |
| prior | {prior} (SHA-256 {sha256}) |
| training data | {data} |
| LoRA | r = {r}, alpha = {lora_alpha}{rslora} |
| guidance | {guidance} |
| guided optimizer steps | {steps} |

## Use

With PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(vlm, "{adapter}")  # vlm is {base}
```

As a model of its own, in the base's precision:

```
drift-peft merge --base {base} --adapter {adapter} -o merged --verify
```
{end}
"""


def update_card(folder: Path, config: DriftConfig) -> None:
    """Fill in the README.md that PEFT has written into an adapter's folder.

    PEFT's untouched template is replaced; of a card that somebody has edited only the section between our two markers
    is. Its metadata stays, with the tag `drift-peft` added. A folder without a card gets none.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.tags or []), "drift-peft", "lora"})
    section = _section(config)
    marked = re.compile(re.escape(START) + ".*?" + re.escape(END) + "\n?", re.DOTALL)
    if marked.search(card.text):
        card.text = marked.sub(lambda _: section, card.text)
    else:
        card.text = section if UNTOUCHED in card.text else f"{section}\n{card.text.lstrip()}"
    card.save(path)


def _section(config: DriftConfig) -> str:
    settings = {name: getattr(config, f"drift_{name}") for name in SHOWN}
    defaults = {name: type(config).__dataclass_fields__[f"drift_{name}"].default for name in SHOWN}
    told = [f"{name} = {value}" for name, value in settings.items() if value and value != defaults[name]]
    guidance = [f"{settings['scale']} toward {settings['target']}, strength {settings['alpha']}"]
    guidance += [text for text in told if text.split(" = ")[0] not in ("scale", "target", "alpha")]
    return SECTION.format(
        start=START,
        end=END,
        base=config.base_model_name_or_path or "its base model",
        expert=config.expert or "a text-only reasoning model",
        prior=config.prior or "none",
        sha256=(config.prior_sha256 or "not recorded")[:16],
        data=config.trained_on or "not recorded",
        r=config.r,
        lora_alpha=config.lora_alpha,
        rslora=", rank-stabilized" if config.use_rslora else "",
        guidance=", ".join(guidance),
        steps=int(config.drift_steps),
        adapter="path/or/hub-id",
    )
