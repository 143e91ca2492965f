"""One canonical name per language-model weight, whatever wrote or wraps it, and exact PEFT targets.

The prefix in front of `layers.N.` depends on the model family, on the transformers version that wrote the file and on
wrappers (PEFT, DDP, FSDP, torch.compile). Looking a weight up by its own path therefore fails silently; here every
name is first reduced to what the text LLM itself would call it: `layers.N.REST`, `embed_tokens.REST`, `norm.REST` or
`lm_head.REST`.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence

_ATTENTION, _MLP = r"self_attn\.[qkvo]_proj", r"mlp\.(?:gate|up|down)_proj"

PROJECTION = re.compile(rf"layers\.\d+\.(?:{_ATTENTION}|{_MLP})\.weight")
"""Canonical names of the seven projections of a layer; use with `fullmatch`."""

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:base_model\.model|base_layer|module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_LANGUAGE_MODEL = re.compile(
    r"(?:thinker\.)?(?:model\.)?(?:(?:language_model|text_model)\.)?(?:model\.){0,2}"
    r"(?:layers\.(?P<index>\d+)\.(?P<rest>.+)|(?P<other>(?:embed_tokens|norm|lm_head)\..+))"
)
_KINDS = (
    ("bias", re.compile(r"(?:layers|embed_tokens|norm|lm_head)\b.*\.bias")),
    ("attn", re.compile(rf"layers\.\d+\.{_ATTENTION}\.weight")),
    ("mlp", re.compile(rf"layers\.\d+\.{_MLP}\.weight")),
    ("norm", re.compile(r"(?:layers\.\d+\.(?:\w+\.)*\w*norm|norm)\.weight")),
    ("head", re.compile(r"lm_head\.weight")),
    ("embed", re.compile(r"embed_tokens\.weight")),
)


def canonical_name(name: str, cross_attention_layers: Sequence[int] = ()) -> str | None:
    """Name of a language-model tensor as the text LLM would write it, or None if it belongs to something else.

    Args:
        name: a tensor's key in a checkpoint or a parameter's name in a model, in any layout and wrapper.
        cross_attention_layers: the VLM's layers that the text LLM lacks (mllama). They give None, and the layers
            between them are counted as the text LLM counts them.

    >>> canonical_name("base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight")
    'layers.0.self_attn.q_proj.weight'
    """
    match = _LANGUAGE_MODEL.fullmatch(_WRAPPER.sub("", name))
    if match is None:
        return None
    if match["other"]:
        return match["other"]
    index = int(match["index"])
    if index in cross_attention_layers:
        return None
    return f"layers.{index - sum(layer < index for layer in cross_attention_layers)}.{match['rest']}"


def module_kind(canonical: str) -> str | None:
    """The preset a canonical weight name falls under: attn, mlp, norm, bias, head, embed, or None for any other."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(canonical)), None)


def layer_order(canonical: str) -> list[str | int]:
    """Key that sorts canonical names by layer, 2 before 10; of `layers.N.REST`, its second entry is N."""
    first, *rest = canonical.split(".")
    return [first, int(rest[0]), *rest[1:]] if first == "layers" else [first, *rest]


def cross_attention_layers(config) -> tuple[int, ...]:
    """Indices of the cross-attention layers that a transformers config places among the text layers (mllama only)."""
    return tuple(getattr(config.get_text_config(), "cross_attention_layers", None) or ())


def language_model_targets(model, names: Iterable[str] | None = None, layers: Container[int] | None = None) -> str:
    """Regular expression for PEFT's `target_modules` that hits exactly the language model's projections.

    Args:
        model: a transformers model, vision-language or text only, or a PEFT model around one.
        names: canonical weight names to keep, such as a prior's; all projections if None.
        layers: indices of the layers to keep, as the model counts them; all if None.

    Raises:
        ValueError: no module would be hit.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    prefix = next((name for name, module in base.named_modules() if module is decoder), None)
    if prefix is None:
        raise ValueError(
            f"{type(base).__name__} does not say where its language model is: pass target_modules yourself"
        )
    cross = cross_attention_layers(base.config)
    keep = None if names is None else set(names)

    found = defaultdict(list)  # layer index -> projections in it
    for name, _ in decoder.named_modules():
        if match := re.fullmatch(rf"layers\.(\d+)\.({_ATTENTION}|{_MLP})", name):
            canonical = canonical_name(f"{name}.weight", cross)
            wanted = (keep is None or canonical in keep) and (layers is None or int(match[1]) in layers)
            if canonical is not None and wanted:
                found[int(match[1])].append(match[2])
    if not found:
        of = "" if keep is None else f" among the {len(keep)} names given"
        of += "" if layers is None else f" in its layers {layers}"
        raise ValueError(f"{type(base).__name__} has no attention or MLP projection in its language model{of}")

    alike = defaultdict(list)  # equal sets of projections -> layer indices, so that the expression stays short
    for index, projections in sorted(found.items()):
        alike[tuple(sorted(projections))].append(index)
    prefix = re.escape(prefix + "." if prefix else "") + r"layers\."
    return "|".join(
        rf"{prefix}({'|'.join(map(str, indices))})\.({'|'.join(map(re.escape, projections))})"
        for projections, indices in alike.items()
    )
