"""The model card of an adapter, filled in: what it was trained from, toward what and how, and how others use it."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers.utils import PushToHubMixin

if TYPE_CHECKING:
    from .config import DriftConfig

START, END = "<!-- drift_peft: this section is written anew at every save -->", "<!-- /drift_peft -->"
PUSHED = "This is the model card of a 🤗 transformers model"  # in the empty card of transformers' push_to_hub
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
# LoRA adapter for {base}{toward}

Trained with [DRIFT](https://arxiv.org/abs/2510.15050): {method}. The adapter itself is plain LoRA.

| | |
|---|---|
| base | {base} |
| expert | {expert} |
| prior | {prior} |
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

    The template that PEFT starts from is replaced where nobody has filled in anything; of every other card only the
    section between our two markers is. Its metadata stays, with the tag `drift-peft` added. A folder without a card
    gets none.
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
        template = ModelCard.from_template(ModelCardData()).text
        card.text = f"{section}\n{card.text.removeprefix(template).lstrip()}"
    temporary = path.with_suffix(".tmp")
    card.save(temporary)
    os.replace(temporary, path)


def _filled_in(upload):
    """`push_to_hub` puts the card of the repository, or an empty one, in place of what was saved: fill in that one."""

    @functools.wraps(upload)
    def wrapper(model: PeftModel, working_dir: str, *args, **kwargs):
        from .config import DriftConfig  # which imports this module

        config, card = model.peft_config.get("default"), Path(working_dir, "README.md")
        if isinstance(config, DriftConfig):
            if PUSHED in card.read_text(encoding="utf-8"):
                card.unlink()
            model.create_or_update_model_card(working_dir)
            update_card(Path(working_dir), config)
        return upload(model, working_dir, *args, **kwargs)

    return wrapper


PeftModel._upload_modified_files = _filled_in(PushToHubMixin._upload_modified_files)


def _section(config: DriftConfig) -> str:
    settings = {name: getattr(config, f"drift_{name}") for name in SHOWN}
    defaults = {name: type(config).__dataclass_fields__[f"drift_{name}"].default for name in SHOWN}
    told = [f"{name} = {value}" for name, value in settings.items() if value not in (defaults[name], {})]
    guidance = [f"{settings['scale']} toward {settings['target']}, strength {settings['alpha']}"]
    guidance += [text for text in told if text.split(" = ")[0] not in ("scale", "target", "alpha")]
    base = config.base_model_name_or_path or "its base model"
    expert = config.expert or "a text-only reasoning model"
    method = METHODS[config.drift_target if config.drift_scale == "decoupled" else "gradient"]
    return SECTION.format(
        start=START,
        end=END,
        toward="" if config.drift_target == "base" else f", steered toward {expert}",
        method=method.format(base=base, expert=expert),
        base=base,
        expert=config.expert or "not recorded",
        prior=f"{config.prior} (SHA-256 {(config.prior_sha256 or 'not recorded')[:16]})" if config.prior else "none",
        data=config.trained_on or "not recorded",
        r=config.r,
        lora_alpha=config.lora_alpha,
        rslora=", rank-stabilized" if config.use_rslora else "",
        guidance=", ".join(guidance).replace("|", "\\|"),
        steps=int(config.drift_steps),
        adapter="path/or/hub-id",
    )
