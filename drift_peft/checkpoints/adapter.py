"""The files of a LoRA adapter as `save_pretrained` writes them: its config, and what each of its tensors does."""

import math
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from .naming import EMBEDDING, HEAD, canonical_name, pattern_matches
from .promised import PART
from .schema import AdapterConfig, check, read_json
from .shards import load_bin
from .update import LowRank, Rows, Update, Whole, is_finite

CONFIG = "adapter_config.json"
FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# Starts that leave the base weight as it is; PiSSA and its like move a part of it into the adapter.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
UNMARKED_VARIANTS = ("use_dora", "alora_invocation_tokens", "use_bdlora", "arrow_config")  # by PEFT 0.18 and 0.19
EXACT_STARTS = ("pissa", "olora")  # which PEFT makes of the base again, to the same numbers, as it loads the adapter
IN_MEMORY = "merge it in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
DIVERGED = "its training diverged, so take an earlier checkpoint"
TIED = {EMBEDDING: "the head", HEAD: "the embedding"}


def read_adapter_config(folder: Path) -> LoraConfig:
    """The adapter's config; what cannot be merged is refused by name."""
    try:
        check(read_json(folder / CONFIG), AdapterConfig)
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # each type of adapter has its own way to say that its configuration is not for it
        raise ValueError(f"PEFT cannot read the {CONFIG} of adapter {folder}: {error}") from error
    if type(config) is not LoraConfig:
        raise ValueError(f"adapter {folder} is {config.peft_type.value}, not LoRA; {IN_MEMORY}")
    variants = [name for name in lora_variants() if name != "use_dora"]
    others = ["use_qalora", "target_parameters", "layer_replication"]
    used = [name for name in [*variants, *others] if getattr(config, name, None)]
    if (start := config.init_lora_weights) not in (*PLAIN_STARTS, *EXACT_STARTS):
        raise ValueError(
            f"adapter {folder} uses init_lora_weights={start!r}, whose start has changed the base, is not in the file, "
            "and need not come out the same when it is made again: merge it in the process that trained it, or save it "
            "there with path_initial_model_for_weight_conversion of PEFT's save_pretrained, which makes it plain LoRA"
        )
    used += ["init_lora_weights"] if start in EXACT_STARTS else []
    if used:
        values = " and ".join(f"{name}={getattr(config, name)!r}" for name in used)
        raise ValueError(f"adapter {folder} uses {values}, which is more than W + s·B·A; {IN_MEMORY}")
    return config


def named_adapters(folder: Path) -> list[str]:
    """Adapters below a folder, which is how PEFT saves those that have a name."""
    return sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))


def lora_variants() -> list[str]:
    """Names of the fields of PEFT's `LoraConfig` that ask for a variant of LoRA, in PEFT's order."""
    known = [f for f in fields(LoraConfig) if f.metadata.get("is_lora_variant") or f.name in UNMARKED_VARIANTS]
    return [f.name for f in known]


def read_updates(folder: Path) -> dict[str, Update]:
    """In-memory name of a tensor, as the adapter has it -> its update."""
    config = read_adapter_config(folder)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    updates: dict[str, Update] = {}
    for key, tensor in _adapter_tensors(folder).items():
        name = key.removeprefix("base_model.model.")
        module, _, attribute = name.rpartition(".")
        if match := PART.fullmatch(name):
            if not is_finite(tensor):
                raise ValueError(f"adapter {folder} holds NaN or infinity in {key}: {DIVERGED}")
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" not in name and (
            config.modules_to_save
            or (config.bias != "none" and attribute == "bias")
            or canonical_name(name) in TIED  # PEFT saves them by itself where the vocabulary has another size
        ):
            updates[name] = Whole(module, tensor)
        else:
            raise ValueError(f"adapter {folder} holds {key}, which is no part of LoRA; {IN_MEMORY}")
    for module, parts in modules.items():
        for attribute, update in _module_updates(folder, config, module, parts).items():
            if (name := f"{module}.{attribute}") in updates:
                raise ValueError(f"adapter {folder} trains {module} in two ways at once; {IN_MEMORY}")
            updates[name] = update
    if not updates:
        raise ValueError(f"adapter {folder} holds no weights: it was saved from a model that is not wrapped")
    return updates


def _module_updates(folder: Path, config: LoraConfig, module: str, parts: dict[str, torch.Tensor]) -> dict[str, Update]:
    """Of the module's weight and bias."""
    updates: dict[str, Update] = {}
    start = parts.pop("base_layer.weight", None)
    if (values := parts.pop("token_adapter.trainable_tokens_delta", None)) is not None:
        rows = _token_rows(config, module)
        if len(rows) != len(values):
            raise ValueError(
                f"adapter {folder} holds {len(values)} rows of {module}, and trainable_token_indices in its {CONFIG} "
                f"names {len(rows)}: save or fetch it again"
            )
        updates["weight"] = Rows(module, torch.tensor(rows), values)
    if (bias := parts.pop("base_layer.bias", None)) is not None:
        updates["bias"] = Whole(module, bias)
    if not parts:
        return updates

    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = [f"lora_embedding_{factor}" if embedding else f"lora_{factor}.weight" for factor in "AB"]
    names += ["lora_magnitude_vector"] if config.use_dora else []
    names += ["lora_B.bias"] if config.lora_bias else []
    if missing := [name for name in names if name not in parts]:
        held = " and ".join(sorted(parts))
        raise ValueError(
            f"adapter {folder} holds only {held} of {module}, without {missing[0]}: save the adapter again"
        )
    A, B, *_ = (parts[name] for name in names)
    # r, alpha and scaling as peft.tuners.lora looks them up; the patterns speak of the names the adapter has.
    r = _of_pattern(config.rank_pattern, module, config.r)
    alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
    if A.dim() == B.dim() > 2:
        raise ValueError(f"adapter {folder} adapts {module}, which is a convolution; {IN_MEMORY}")
    if (A.dim(), B.dim()) != (2, 2) or A.shape[0] != r or B.shape[1] != r:
        raise ValueError(
            f"adapter {folder} says r={r} for {module}, but its lora_A is {list(A.shape)} and its lora_B "
            f"{list(B.shape)}: its {CONFIG} belongs to other weights, or they were saved sharded"
        )
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    magnitude = parts.get("lora_magnitude_vector")
    if embedding and magnitude is not None:
        raise ValueError(f"adapter {folder} uses DoRA on the embedding {module}; {IN_MEMORY}")
    if embedding:
        A, B = B.mT, A.mT  # W [in, out] + s·(B·A)ᵀ
    if "weight" in updates or ("lora_B.bias" in parts and "bias" in updates):
        raise ValueError(f"adapter {folder} trains {module} in two ways at once; {IN_MEMORY}")
    updates["weight"] = LowRank(module, A, B, scaling, magnitude, start)
    if "lora_B.bias" in parts:
        updates["bias"] = Whole(module, scaling * parts["lora_B.bias"].float(), added=True)
    return updates


def _of_pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name."""
    return next((value for key, value in (patterns or {}).items() if pattern_matches(key, module)), default)


def _token_rows(config: LoraConfig, module: str) -> list[int]:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):  # by the end of the module's name
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if indices is None:
        raise ValueError(f"trainable_token_indices of the adapter's {CONFIG} does not name the rows of {module}")
    return indices


def _adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    safe, pickled = (folder / name for name in FILES[1:])
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return load_bin(pickled, str(pickled), map_location="cpu")
    except SafetensorError as error:
        raise ValueError(f"adapter {folder} is truncated or damaged ({error}): save or fetch it again") from error
    raise FileNotFoundError(f"adapter {folder} holds neither {safe.name} nor {pickled.name}")
