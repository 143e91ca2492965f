"""One canonical name per language-model weight, whatever wrote or wraps it.

The prefix in front of `layers.N.` depends on the model family, on the transformers version that wrote the file and on
wrappers (PEFT, DDP, FSDP, torch.compile). Looking a weight up by its own path therefore fails silently; here every
name is first reduced to what the text LLM itself would call it: `layers.N.REST`, `embed_tokens.REST`, `norm.REST` or
`lm_head.REST`. What a model's weights are called is asked of the model itself (decoder.py); the rule here serves names
without a model, and files that no version of transformers reads.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

import regex

PROJECTIONS = ("attn", "mlp")
"""Presets of what is a matrix in a layer."""

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

MATCHING = 1.0  # seconds for a regular expression and a name, which take microseconds

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:base_model\.model|base_layer|original_module|modules_to_save\.[^.]+|module|_orig_mod"
    r"|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_LANGUAGE_MODEL = re.compile(
    r"(?:thinker\.)?(?:model\.)?(?:(?:language_model|text_model)\.)?(?:model\.){0,2}"
    r"(?:layers\.(?P<index>\d+)\.(?P<rest>.+)|(?P<other>(?:embed_tokens|norm|lm_head)\..+))"
)
# Parts of a name inside a layer. What mixes tokens: self, linear and latent attention, short convolutions, recurrences.
_MIXING = re.compile(r"\w*(?:attn|att|[aA]ttention)|conv|mamba|temporal_block|mlstm_layer")
_TOKEN_WISE = re.compile(r"up_proj|down_proj|shared_experts")  # beside it under `mixer`, the name of both
# What chooses (routers of experts, indexers of tokens), is chosen (expert stacks), looks at more than the tokens, is
# multiplied with past its module (Gemma 3n's coefficients), or is no weight of the base.
_UNSTEERED = re.compile(
    r"gate|\w*router\w*|\w*expert_gate|indexer|\w+_coefs|experts|\w*conv1d|(?:cross|encoder)\w*att\w*|EncDec\w*|lora_\w+"
)


def unwrapped(name: str) -> str:
    """The name of a parameter or module without what PEFT, DDP, FSDP, checkpointing and torch.compile put into it."""
    return _WRAPPER.sub("", f"{name}.").removesuffix(".")


def canonical_name(name: str, cross_attention_layers: Sequence[int] = ()) -> str | None:
    """Name of a language-model tensor as the text LLM would write it, or None if it belongs to something else.

    Args:
        name: a tensor's key in a checkpoint or a parameter's name in a model, in any layout and wrapper.
        cross_attention_layers: the VLM's layers that the text LLM lacks (mllama). They give None, and the layers
            between them are counted as the text LLM counts them.

    >>> canonical_name("base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight")
    'layers.0.self_attn.q_proj.weight'
    """
    match = _LANGUAGE_MODEL.fullmatch(unwrapped(name))
    if match is None:
        return None
    if match["other"]:
        return match["other"]
    index = int(match["index"])
    if index in cross_attention_layers:
        return None
    return f"layers.{index - sum(layer < index for layer in cross_attention_layers)}.{match['rest']}"


def module_kind(canonical: str) -> str | None:
    """The preset a canonical name falls under: attn, mlp, norm, bias, head, embed, or None for any other.

    In a layer, `attn` is what mixes tokens, and `mlp` all else that is a projection.
    """
    module, _, attribute = canonical.rpartition(".")
    kind, *parts = module.split(".")
    if kind in ("lm_head", "embed_tokens") and attribute == "weight" and not parts:
        return {"lm_head": "head", "embed_tokens": "embed"}[kind]
    if any(map(_UNSTEERED.fullmatch, parts)):
        return None
    if attribute not in ("weight", "bias") or (kind != "layers" and parts):  # beside the layers: a tower, a tokenizer
        return None
    if attribute == "bias":
        return "bias"
    if "norm" in module.rpartition(".")[2].lower():
        return "norm"
    if kind != "layers" or len(parts) < 2:
        return None
    mixer = "mixer" in parts and not any(map(_TOKEN_WISE.fullmatch, parts))
    return "attn" if mixer or any(map(_MIXING.fullmatch, parts)) else "mlp"


def pattern_matches(pattern: str, name: str) -> bool:
    """As PEFT's rank_pattern: the expression matches the name, or its end after a dot.

    Raises:
        ValueError: it is no regular expression, or takes more than a second for one name, as (a+)+ may for ever.
    """
    try:
        return regex.fullmatch(rf"(?:.*\.)?(?:{pattern})", name, timeout=MATCHING) is not None
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error.msg}") from error
    except TimeoutError as error:
        raise ValueError(
            f"the regular expression {pattern!r} takes too long for {name!r}: write a simpler one"
        ) from error


def layer_order(canonical: str) -> list[str | int]:
    """Key that sorts canonical names by layer, 2 before 10."""
    first, *rest = canonical.split(".")
    return [first, int(rest[0]), *rest[1:]] if first == "layers" else [first, *rest]


def layer_of(canonical: str) -> int | None:
    """N of `layers.N.REST`; None outside of the layers."""
    return layer_order(canonical)[1] if canonical.startswith("layers.") else None


def sampled(names: Iterable[str], most: int) -> list[str]:
    """At most so many of these names, spread over all of them: their hashes alone decide which."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:most]


def cross_attention_layers(config) -> tuple[int, ...]:
    """Indices of the cross-attention layers that a transformers config places among the text layers (mllama only)."""
    return tuple(getattr(config.get_text_config(), "cross_attention_layers", None) or ())


def says_tied(config) -> bool:
    """Whether a transformers config says, at its top or of the text model, that embedding and head are one weight."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
