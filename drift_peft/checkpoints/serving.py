"""How an adapter is loaded, merged and served, as the cards tell it."""

from __future__ import annotations

import shlex
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .hub import at_revision

TASK = "image-text-to-text"  # what the hub calls it: the pipeline tag of a VLM, and of what is made for one
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be

WITH_PEFT = """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(vlm, "{adapter}"{subfolder})  # vlm is {words}
```"""
WITH_PROCESSOR = """\
```python
from peft import PeftModel
from transformers import {auto_class}, AutoProcessor

vlm = {auto_class}.from_pretrained("{base}"{at}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(vlm, "{adapter}"{subfolder})
processor = AutoProcessor.from_pretrained("{base}"{at})
```"""
BESIDE = """\
vLLM serves the adapter beside its base. `export` writes it under vLLM's names, and refuses what vLLM would leave out:

```
drift-peft export {folder} --for vllm -o served
vllm serve {argument}{at} --enable-lora --max-lora-rank {rank} --lora-modules drift=served
```

"""
MERGED = """\
As a model of its own, in the base's precision:

```
drift-peft merge --base {pinned} --adapter {folder} -o merged --verify
```

vLLM serves the merged folder as it serves the base:

```
vllm serve merged
```

llama.cpp runs it where its converter knows the architecture:

```
python convert_hf_to_gguf.py merged{tower}
```"""
TOWER = "\npython convert_hf_to_gguf.py merged --mmproj  # the vision tower, a file of its own"


def auto_class_of(config: Any) -> type:
    """The transformers auto class that loads a model of this configuration."""
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    talks = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForMultimodalLM if talks else AutoModelForCausalLM


def how_to_load(
    base: str,
    words: str,
    loaded_by: str | None,
    adapter: str,
    subfolder: str | None = None,
    revision: str | None = None,
) -> str:
    """Python that loads an adapter with PEFT alone.

    Args:
        base: what it is loaded by.
        words: the base in Markdown.
        loaded_by: name of its auto class; without that of a VLM, it is taken as loaded.
        adapter, subfolder: what the adapter is loaded by.
        revision: of the base, where one is known.
    """
    plain = loaded_by in (None, AutoModelForCausalLM.__name__)
    return (WITH_PEFT if plain else WITH_PROCESSOR).format(
        base=base.replace("\\", "\\\\").replace('"', '\\"'),
        words=words,
        auto_class=loaded_by,
        adapter=adapter,
        subfolder=f', subfolder="{subfolder}"' if subfolder else "",
        at=f', revision="{revision}"' if revision else "",
    )


def how_to_serve(base: str, loaded_by: str | None, folder: str, rank: int | None, revision: str | None = None) -> str:
    """Commands that serve an adapter: beside its base, and merged.

    Args:
        base, loaded_by, revision: as of `how_to_load`.
        folder: the adapter's.
        rank: its rank; None of an adapter that vLLM cannot take beside its base, such as one of several ranks.
    """
    plain, at = " ".join(base.split()), f" --revision {shlex.quote(revision)}" if revision else ""
    values = {"argument": shlex.quote(plain), "folder": folder, "at": at}
    values["pinned"] = shlex.quote(at_revision(plain, revision))
    allowed = None if rank is None else next((r for r in MAX_LORA_RANKS if r >= rank), None)
    beside = "" if allowed is None else BESIDE.format(**values, rank=allowed)
    tower = TOWER if loaded_by == AutoModelForImageTextToText.__name__ else ""
    return beside + MERGED.format(**values, tower=tower)
