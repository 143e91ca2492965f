"""The card of a keep set, for its hub repository."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import TASK, find_license, hub_id, in_markdown, license_name, shown

CARD = """\
---
{data}
---

# Keep set of {vlm}

{samples} answers that {vlm} gave itself, greedily, to questions about unlabelled images ({images} of them), and for
each answer token its {k} largest log probabilities. Training that stays near them keeps what {vlm} can do. Made with
[drift_peft](https://arxiv.org/abs/2510.15050).

| kind of question | samples |
|---|---|
{table}

SHA-256 of the file: `{sha256}`.

## Use

```python
from drift_peft import KeepSet, keep

keep_set = KeepSet.load("{source}")
keep_set[0]  # image, question, answer, tokens and their log probabilities
keep(model, keep_set, processor)  # and train: any loop, LoRA or full fine-tuning
```

where `model` is {vlm}, or what was merged or quantized from it, and `processor` its processor.

## Licences

The file holds the images as their files were. Whoever made it can say where they are from; this card cannot.
The answers are those of {vlm}, whose card gives this licence: {license}
"""


def model_card(
    header: dict, source: str, sha256: str, kinds: dict[str, int], images: int, token: str | None
) -> ModelCard:
    """What a keep set is, how to use it, and the licence of the VLM, as its own card gives it.

    Args:
        header: of the file.
        source: what to load it by.
        kinds: kind of question -> samples.
        images: how many there are.
        token: for the card of a private or gated model.
    """
    vlm, origin = header["vlm"]["id"], header["vlm"]
    if hub_id(vlm) and origin["revision"] is None:  # it was in memory, and nothing said at which commit
        origin = {**origin, "revision": "main"}
    data = ModelCardData(base_model=hub_id(vlm), pipeline_tag=TASK, tags=["drift-peft", "peft"])
    content = CARD.format(
        data=data.to_yaml(),
        vlm=in_markdown(shown(vlm)),
        samples=sum(kinds.values()),
        images=images,
        k=header["k"],
        table="\n".join(f"| {in_markdown(kind)} | {number} |" for kind, number in kinds.items()),
        sha256=sha256,
        source=source,
        license=in_markdown(license_name(find_license(origin, token))),
    )
    return ModelCard(content)
