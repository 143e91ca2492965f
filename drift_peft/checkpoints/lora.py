"""LoRA adapters as `save_pretrained` writes them, read without loading a model: what they make of which tensor of a
checkpoint, and an expert that is given as an adapter on a base.

An adapter carries the in-memory names of the transformers version that trained it, and a checkpoint those of the one
that wrote it. Names of the language model become canonical ones; all others, such as those of the vision tower,
through the renaming that transformers does itself when it loads the checkpoint.
"""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..arguments import listed
from .checkpoint import Checkpoint, named_adapters
from .decoder import shared_weights
from .hub import Repository, folder_of, split_revision
from .naming import EMBEDDING, HEAD, canonical_name, pattern_matches, unwrapped
from .promised import PART, refuse_incomplete
from .schema import AdapterConfig, check, read_json
from .shards import load_bin
from .update import LowRank, Rows, Update, Whole
from .watch import Watch

CONFIG = "adapter_config.json"
DRIFT_CONFIG = "drift_config.json"  # beside it, where the adapter was steered
FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# In safetensors' metadata of W + λΔ that we made ourselves, of full-precision weights. The mark stands in the tensors'
# file: training and saving again drops it there. In a file beside it, it would outlive the weights that it speaks of.
UNTRAINED = {"format": "pt", "drift_peft": "made without training"}
# Starts that leave the base weight as it is; PiSSA and its like move a part of it into the adapter.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
UNMARKED_VARIANTS = ("use_dora", "alora_invocation_tokens", "use_bdlora", "arrow_config")  # by PEFT 0.18 and 0.19
LISTED = 5  # problems that an error spells out
IN_MEMORY = "merge it in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload()"


class AdaptedCheckpoint(Checkpoint):
    """The model that a LoRA adapter makes of its base: `tensor` gives W' in fp32 where the adapter has changed W.

    Args:
        adapter: folder, hub id or `id@revision`. The base is what its adapter_config.json names.
        revision: branch, tag or commit of the adapter's repository.
        dequantize, record: as for Checkpoint; of the base.

    Attributes:
        source, revision: of the adapter. All other attributes of Checkpoint are the base's.
        base: `origin` of the base.

    Raises:
        FileNotFoundError: the adapter or its base is not there.
        ValueError: the adapter has a part that cannot be merged, or does not fit its base.
    """

    def __init__(
        self, adapter: str | Path, revision: str | None = None, dequantize: bool = False, record: Path | None = None
    ):
        self._adapter, self._updates = adapter_folder(adapter, revision), {}
        self._files = watched_adapter(self._adapter, str(adapter))
        config = read_adapter_config(self._adapter)
        if not (base := config.base_model_name_or_path):
            raise ValueError(f"adapter {adapter} does not say what it adapts: base_model_name_or_path in its {CONFIG}")
        try:
            super().__init__(base, None if Path(base).exists() else config.revision, dequantize, record)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"adapter {adapter} adapts {base}, which is not to be had: write the folder or hub id of that model "
                f"into base_model_name_or_path of its {CONFIG} ({error})"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{error}; adapter {adapter} names it as its base: write the folder of another into "
                f"base_model_name_or_path of its {CONFIG}"
            ) from error
        self.base = super().origin
        self._updates = adapter_updates(self._adapter, self, str(adapter))
        if revision is None and Path(adapter).exists():
            self.source, self.revision = str(adapter), None
        else:
            self.source, self.revision = split_revision(str(adapter))[0], self._adapter.name

    @property
    def origin(self) -> dict:
        """Where the weights come from, for a prior's header: the adapter, and `base`."""
        return {**super().origin, "base": self.base}

    @property
    def identity(self) -> list:
        if self.revision is not None:
            return [*super().identity, self.source, self.revision]
        files = [[f.name, *state] for f, state in self._files.states().items()]
        return [*super().identity, os.path.abspath(self.source), files]

    def refuse_changed(self) -> None:
        super().refuse_changed()
        self._files.check()

    def dtype(self, raw: str) -> torch.dtype:
        return torch.float32 if raw in self._updates else super().dtype(raw)

    def tensor(self, raw: str) -> torch.Tensor:
        W = super().tensor(raw)
        if raw not in self._updates:
            return W
        return torch.cat([*self._updates[raw].blocks(W)])


def open_expert(
    source: str | Path, revision: str | None = None, dequantize: bool = False, record: Path | None = None
) -> Checkpoint:
    """A checkpoint, or the one that a LoRA adapter makes of its base; arguments as for Checkpoint."""
    if revision is None and Path(source).exists():
        adapter = Path(source, CONFIG).is_file()
    else:
        repository = Repository(*split_revision(str(source), revision))
        adapter = (repository.folder / CONFIG).is_file()
        source, revision = repository.name, repository.commit
    return (AdaptedCheckpoint if adapter else Checkpoint)(source, revision, dequantize, record)


def is_adapter(source: str | Path) -> bool:
    """Whether a folder or hub repository (`id@revision`) holds an adapter rather than a model."""
    return (folder_of(source, None, [CONFIG]) / CONFIG).is_file()


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter, downloaded if need be. FileNotFoundError if there is none."""
    folder = folder_of(adapter, revision, FILES)
    if not (folder / CONFIG).is_file():
        if named := named_adapters(folder):
            raise FileNotFoundError(f"{adapter} holds the adapters {', '.join(named)}: name one of these folders")
        raise FileNotFoundError(f"adapter {adapter} has no {CONFIG}: name what save_pretrained wrote")
    return folder


def watched_adapter(folder: Path, source: str) -> Watch:
    """Its files, before they are read."""
    return Watch(source, [folder / name for name in FILES])


def adapter_updates(folder: Path, checkpoint: Checkpoint, source: str) -> dict[str, Update]:
    """Raw key of the checkpoint -> what the adapter adds to it.

    Raises:
        FileNotFoundError: the folder lacks the adapter's weights.
        ValueError: the adapter has a part that cannot be merged, by name, or lacks one that its config promises; or not
            each of its modules finds one tensor of its shape: all that do not are listed.
    """
    adapter, config, find = read_updates(folder), read_adapter_config(folder), _tensor_finder(checkpoint)
    updates = _match(checkpoint, adapter, source)
    biases = {f"{update.module}.bias" for update in adapter.values()}
    if config.bias == "lora_only" and not biases & adapter.keys():
        if lost := sorted(name for name in biases if find(name)[1]):
            raise ValueError(
                f"adapter {source} was trained with bias='lora_only' and lacks {lost[0]}, since PEFT before 0.21 does "
                "not save such biases: train it again with a newer one, or with bias='all'"
            )

    def weight_of(name: str) -> str | None:
        canonical, raw = find(name)
        return checkpoint.language_model.get(EMBEDDING) if canonical in TIED and checkpoint.tied else raw

    refuse_incomplete(config, checkpoint.model, adapter, source, weight_of)
    return updates


def recorded_base(folder: Path) -> tuple[str | None, str | None]:
    """The model that an adapter in this folder says it was trained on, None if it does not; and the revision of that
    model's repository, None where it was the newest, or a folder."""
    config = read_adapter_config(folder)
    return config.base_model_name_or_path or None, config.revision or None


def made_without_training(folder: Path) -> bool:
    """Whether the adapter's weights are as we made them, W + λΔ in full precision."""
    file = folder / FILES[1]
    if not file.is_file():
        return False
    with safe_open(file, "pt") as weights:
        return UNTRAINED.items() <= (weights.metadata() or {}).items()


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
    used += ["init_lora_weights"] if config.init_lora_weights not in PLAIN_STARTS else []
    if used:
        values = " and ".join(f"{name}={getattr(config, name)!r}" for name in used)
        raise ValueError(f"adapter {folder} uses {values}, which is more than W + s·B·A; {IN_MEMORY}")
    return config


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
        if not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():  # which some of one byte lack
            raise ValueError(
                f"adapter {folder} holds NaN or infinity in {key}: its training diverged, so take an earlier checkpoint"
            )
        name = key.removeprefix("base_model.model.")
        module, _, attribute = name.rpartition(".")
        if match := PART.fullmatch(name):
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
    flipped = embedding or config.fan_in_fan_out  # embeddings, and GPT-2's Conv1D: W [in, out] + s·(B·A)ᵀ
    if flipped and magnitude is not None:
        what = "the embedding" if embedding else "the transposed weight of"
        raise ValueError(f"adapter {folder} uses DoRA on {what} {module}; {IN_MEMORY}")
    if flipped:
        A, B = B.mT, A.mT
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


def _match(checkpoint: Checkpoint, adapter: dict[str, Update], source: str) -> dict[str, Update]:
    """Raw key of the base -> its update. Every update finds one tensor of its shape, or all that do not are listed."""
    problems, updates, way_out = [], {}, ""
    find, shared = _tensor_finder(checkpoint), shared_weights(checkpoint.model)
    ends: dict[str, Update] = {}  # embedding and head as they were trained, where these are one weight
    for name, update in adapter.items():
        canonical, raw = find(name)
        if canonical in TIED and not isinstance(update, Rows) and checkpoint.tied:
            ends[canonical] = update
            canonical, raw = EMBEDDING, checkpoint.language_model.get(EMBEDDING)
            if len(ends) == 2 and _alike(*ends.values()):  # PEFT's ensure_weight_tying writes it twice
                continue
        if raw is None:
            problems.append(f"the base has no {canonical or name}")
        elif unwrapped(name) in shared:
            problems.append(f"other modules share the weight of {update.module}, and would change with it")
        elif raw in updates:
            problems.append(f"{update.module} and {updates[raw].module} are the same weight {canonical or name}")
        elif wanted := update.misfit(checkpoint.shape(raw)):
            shape = list(checkpoint.shape(raw))
            problems.append(f"{raw} is {shape} in the base and {list(wanted)} in the adapter")
            if canonical in TIED and shape[1:] == list(wanted[1:]):
                way_out = (
                    f"; call resize_token_embeddings({wanted[0]}) on the base, save it, and name that folder as the "
                    f"base (of an expert, in base_model_name_or_path of its {CONFIG})"
                )
        elif wrong := checkpoint.quantized(raw):
            problems.append(f"{raw} {wrong} in the base: name the full-precision one")
        else:
            updates[raw] = update
            if canonical == EMBEDDING and checkpoint.tied and (head := checkpoint.language_model.get(HEAD)):
                updates[head] = update  # some checkpoints hold both
    if len(ends) == 1:
        ((canonical, update),) = ends.items()
        problems.append(
            f"{update.module} shares its weight with {TIED[canonical]}, and only one is trained, which "
            "ensure_weight_tying=True of PEFT 0.19 or newer would have trained as one"
        )
    if problems:
        told = f"adapter {source} does not fit the base {checkpoint.source}: {listed(problems, LISTED)}"
        raise ValueError(told + way_out)
    return updates


def _alike(one: Update, other: Update) -> bool:
    """Do both replace a tensor by the same?"""
    parts = [{key: value for key, value in vars(update).items() if key != "module"} for update in (one, other)]
    return type(one) is type(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b
        for a, b in zip(*(part.values() for part in parts), strict=True)
    )


TIED = {EMBEDDING: "the head", HEAD: "the embedding"}


def _tensor_finder(checkpoint: Checkpoint) -> Callable[[str], tuple[str | None, str | None]]:
    """Name of a tensor in an adapter -> its canonical name, if it is the language model's, and its raw key."""
    decoder = checkpoint.decoder

    def find(name: str) -> tuple[str | None, str | None]:
        name = unwrapped(name)
        canonical = decoder.name(name)
        if canonical not in decoder.kinds:  # another version of transformers named the modules of the model
            canonical = canonical_name(name, decoder.skipped)
        if canonical:
            return canonical, checkpoint.language_model.get(canonical)
        return None, checkpoint.in_memory.get(name) or checkpoint.in_memory.get(checkpoint.layout.name(name))

    return find
