"""The card of a merged model: what it was merged of, the call that did it, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import TASK, Checkpoint, hub_id, in_markdown, shown, split_revision

CARD = """\
---
{data}
---

# {name}

{base} with {what} merged into it. It is a model of its own, with the tensors, the precision and the processor of
{base}. [drift_peft](https://arxiv.org/abs/2510.15050) made it with

```python
{recipe}
```

## Use

```python
from transformers import {auto_class}, {reader}

model = {auto_class}.from_pretrained("path/or/hub-id", dtype="auto", device_map="auto")
processor = {reader}.from_pretrained("path/or/hub-id")
```
"""
SOURCES = ("base", "adapter", "expert", "reference", "keep")  # arguments that name what lies elsewhere, as the output


def write_card(
    folder: Path, base: Checkpoint, what: str, call: str, output: str | Path, arguments: dict[str, object]
) -> None:
    """Write README.md into a merged folder.

    Args:
        folder: where it is made.
        base: what was merged into.
        what: what was merged, in Markdown.
        call: name of the function of drift_peft that merges so.
        output: what the folder will be called.
        arguments: of the call, without the output; those that are None or False are left out.
    """
    given = {name: value for name, value in arguments.items() if value is not None and value is not False}
    given |= {name: shown(str(value)) for name, value in given.items() if name in SOURCES}
    named = {**given, "output": shown(str(output))}
    lines = (f"    {name}={_literal(value)}," for name, value in named.items())
    merged = (str(arguments[role]) for role in ("base", "expert") if role in arguments)
    models = filter(None, (hub_id(split_revision(source)[0]) for source in merged))
    data = ModelCardData(
        base_model=[*models] or None,
        base_model_relation="merge" if "expert" in given else "finetune",
        library_name="transformers",
        pipeline_tag=TASK if base.sees else None,
        tags=["drift-peft", "merge"],
    )
    card = ModelCard(
        CARD.format(
            data=data.to_yaml(),
            name=in_markdown(shown(str(output))),
            base=in_markdown(shown(base.source)),
            what=what,
            recipe="\n".join([f"{call}(", *lines, ")"]),
            auto_class=base.auto_class.__name__,
            reader="AutoProcessor" if base.sees else "AutoTokenizer",
        )
    )
    card.save(folder / "README.md")


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
