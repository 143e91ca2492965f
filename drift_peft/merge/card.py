"""The card of a merged model: what it was merged of, the licences of that, the call that did it, how it is loaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..checkpoints import (
    TASK,
    Checkpoint,
    in_markdown,
    pinned,
    repository_of,
    state_licences,
)

CARD = """\
---
{data}
---

# {name}

{made} It is a model of its own. [drift_peft](https://arxiv.org/abs/2510.15050) {version} made it so:

```python
from drift_peft import {call}

{call}(
{arguments}
)
```

## Use

```python
from transformers import {auto_class}, {reader}

model = {auto_class}.from_pretrained("path/or/hub-id", dtype="auto", device_map="auto")
processor = {reader}.from_pretrained("path/or/hub-id")
```

## Licences

It is made of other models' weights. Their cards give these licences:

{licences}
"""


def write_card(
    folder: Path,
    output: str | Path,
    base: Checkpoint,
    made: str,
    call: str,
    sources: dict[str, dict],
    arguments: dict[str, object],
) -> None:
    """Write README.md into a merged folder.

    Args:
        folder: where it is made.
        output: where it will lie.
        base: what was merged into.
        made: what was merged, as a sentence in Markdown.
        call: name of the function of drift_peft that merges so.
        sources: role -> id and revision of the models that it takes; the base's is known.
        arguments: others of the call. Those that are None or False are left out.
    """
    sources = {"base": base.origin, **sources}
    name = Path(output).resolve().name
    given = {role: pinned(origin) for role, origin in sources.items()}
    given["output"] = name
    given |= {key: value for key, value in arguments.items() if value is not None and value is not False}
    license, licences = licences_of(sources)
    repositories = filter(None, (repository_of(sources[role]) for role in ("base", "expert") if role in sources))
    data = ModelCardData(
        base_model=[id for id, _ in repositories] or None,
        base_model_relation="merge" if "expert" in sources else "finetune",
        library_name="transformers",
        pipeline_tag=TASK if base.sees else None,
        tags=["drift-peft", "merge"],
        **license,
    )
    card = CARD.format(
        data=data.to_yaml(),
        name=in_markdown(name),
        made=made,
        version=__version__,
        call=call,
        arguments="\n".join(f"    {key}={value!r}," for key, value in given.items()),
        auto_class=base.auto_class.__name__,
        reader="AutoProcessor" if base.sees else "AutoTokenizer",
        licences=licences,
    )
    ModelCard(card).save(folder / "README.md")


def licences_of(sources: dict[str, dict]) -> tuple[dict, str]:
    """`state_licences` of what was taken, role -> id and revision, and of the bases of what is an adapter there."""
    parts = {**sources, **{f"{role}'s base": origin["base"] for role, origin in sources.items() if "base" in origin}}
    own = {role for role, origin in parts.items() if role == "adapter" and not repository_of(origin)}  # on this disk
    return state_licences((role, origin) for role, origin in parts.items() if role not in own)
