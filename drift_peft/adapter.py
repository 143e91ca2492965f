"""Plain LoRA adapters as `save_pretrained` writes them, read without loading a model: what W + s·B·A adds to which
weight of a checkpoint, and an expert that is given as an adapter on a base.

Names go through `canonical_name`, because an adapter carries the in-memory names of the transformers version that
trained it, and a checkpoint those of the one that wrote it.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checkpoint import Checkpoint
from .hub import Repository, download, split_revision
from .naming import canonical_name, cross_attention_layers
from .shards import load_bin

CONFIG = "adapter_config.json"
FILES = (CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# Starts that leave the base weight as it is; PiSSA and its like move a part of it into the adapter.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
IN_MEMORY = "merge it in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload()"


@dataclass(frozen=True)
class Update:
    """s·B·A for one weight W [out, in]: A [r, in], B [out, r] as stored, memory-mapped."""

    module: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class AdaptedCheckpoint(Checkpoint):
    """The model that a LoRA adapter makes of its base: `tensor` gives W + s·B·A in fp32 where the adapter has factors.

    Args:
        adapter: folder, hub id or `id@revision`. The base is what its adapter_config.json names.
        revision: branch, tag or commit of the adapter's repository.
        dequantize, record: as for Checkpoint; of the base.

    Attributes:
        source, revision: of the adapter. All other attributes of Checkpoint are the base's.
        base: `origin` of the base.

    Raises:
        FileNotFoundError: the adapter or its base is not there.
        ValueError: the adapter is more than W + s·B·A, or does not fit its base.
    """

    def __init__(
        self, adapter: str | Path, revision: str | None = None, dequantize: bool = False, record: Path | None = None
    ):
        self._adapter, self._updates = adapter_folder(adapter, revision), {}
        config = _read_config(self._adapter)
        if not (base := config.base_model_name_or_path):
            raise ValueError(f"adapter {adapter} does not say what it adapts: base_model_name_or_path in its {CONFIG}")
        try:
            super().__init__(base, None if Path(base).exists() else config.revision, dequantize, record)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"adapter {adapter} adapts {base}, which is not to be had: write the folder or hub id of that model "
                f"into base_model_name_or_path of its {CONFIG} ({error})"
            ) from error
        self.base = super().origin
        self._updates = adapter_updates(self._adapter, self, str(adapter))
        if Path(adapter).exists():
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
        stats = {name: (self._adapter / name).stat() for name in FILES if (self._adapter / name).exists()}
        return [*super().identity, self.source, [[n, stat.st_size, stat.st_mtime_ns] for n, stat in stats.items()]]

    def dtype(self, raw: str) -> torch.dtype:
        return torch.float32 if raw in self._updates else super().dtype(raw)

    def tensor(self, raw: str) -> torch.Tensor:
        W = super().tensor(raw)
        if raw not in self._updates:
            return W
        update = self._updates[raw]
        return torch.addmm(W.float(), update.B.float(), update.A.float(), alpha=update.scaling)


def open_expert(
    source: str | Path, revision: str | None = None, dequantize: bool = False, record: Path | None = None
) -> Checkpoint:
    """A checkpoint, or the one that a LoRA adapter makes of its base; arguments as for Checkpoint."""
    if Path(source).exists():
        adapter = Path(source, CONFIG).is_file()
    else:
        repository = Repository(*split_revision(str(source), revision))
        adapter = (repository.folder / CONFIG).is_file()
        source, revision = repository.name, repository.commit
    return (AdaptedCheckpoint if adapter else Checkpoint)(source, revision, dequantize, record)


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter, downloaded if need be. FileNotFoundError if there is none."""
    folder = Path(adapter) if Path(adapter).exists() else download(*split_revision(str(adapter), revision), FILES)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"adapter {adapter} has no {CONFIG}: name what save_pretrained wrote")
    return folder


def adapter_updates(folder: Path, checkpoint: Checkpoint, source: str) -> dict[str, Update]:
    """Raw key of the checkpoint -> what the adapter adds to it.

    Raises:
        FileNotFoundError: the folder lacks the adapter's weights.
        ValueError: the adapter has a part that plain addition cannot express, by name; or not each of its modules finds
            one weight of its shape: all that do not are listed.
    """
    return _match(checkpoint, _read_updates(folder, checkpoint), source)


def _read_config(folder: Path) -> LoraConfig:
    """The adapter's config; what is more than W + s·B·A is refused by name."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"PEFT cannot read the {CONFIG} of adapter {folder}: {error}") from error
    if type(config) is not LoraConfig:
        raise ValueError(f"adapter {folder} is {config.peft_type.value}, not plain LoRA; {IN_MEMORY}")
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant")]
    others = ["use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"]
    used = [name for name in [*variants, *others, "layer_replication"] if getattr(config, name, None)]
    used += ["bias"] if config.bias != "none" else []
    used += ["init_lora_weights"] if config.init_lora_weights not in STARTS else []
    if used:
        values = " and ".join(f"{name}={getattr(config, name)!r}" for name in used)
        raise ValueError(f"adapter {folder} uses {values}, which is more than W + s·B·A; {IN_MEMORY}")
    return config


def _read_updates(folder: Path, checkpoint: Checkpoint) -> dict[str, list[Update]]:
    """Canonical weight name -> updates."""
    config = _read_config(folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _adapter_tensors(folder).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"adapter {folder} holds {key}, which is no factor of plain LoRA; {IN_MEMORY}")
        factors.setdefault(match[1], {})[match[2]] = tensor
    updates: dict[str, list[Update]] = {}
    skipped = cross_attention_layers(checkpoint.config)
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"adapter {folder} holds only lora_{''.join(pair)} of {module}: save the adapter again")
        name = canonical_name(f"{module}.weight", skipped)
        if name is None or not name.startswith("layers."):
            # lm_head among them: it may be tied to the embedding, which would then change too.
            raise ValueError(f"adapter {folder} adapts {module}, which is in no layer of the text model; {IN_MEMORY}")
        # r, alpha and scaling as peft.tuners.lora looks them up; the patterns speak of the names the adapter has.
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        shapes = [list(pair[factor].shape) for factor in "AB"]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != r or shapes[1][1] != r:
            raise ValueError(
                f"adapter {folder} says r={r} for {module}, but its lora_A is {shapes[0]} and its lora_B {shapes[1]}: "
                "its adapter_config.json belongs to other weights, or they were saved sharded"
            )
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        updates.setdefault(name, []).append(Update(module, pair["A"], pair["B"], scaling))
    if not updates:
        raise ValueError(f"adapter {folder} holds no weights: it was saved from a model that is not wrapped")
    return updates


def _adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    safe, pickled = (folder / name for name in FILES[1:])
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return load_bin(pickled, str(pickled), map_location="cpu")
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"adapter {folder} is truncated or damaged ({error}): save or fetch it again") from error
    raise FileNotFoundError(f"adapter {folder} holds neither {safe.name} nor {pickled.name}")


def _match(checkpoint: Checkpoint, adapter: dict[str, list[Update]], source: str) -> dict[str, Update]:
    """Raw key of the base -> its update. Every adapter module finds one weight of its shape, or all that do not are
    listed."""
    problems, updates = [], {}
    for name, (update, *more) in adapter.items():
        raw = checkpoint.language_model.get(name)
        wanted = (update.B.shape[0], update.A.shape[1])
        if more:
            problems.append(f"{update.module} and {more[0].module} are the same weight {name}")
        elif raw is None:
            problems.append(f"the base has no {name}")
        elif checkpoint.shape(raw) != wanted:
            problems.append(f"{raw} is {list(checkpoint.shape(raw))} in the base and {list(wanted)} in the adapter")
        elif not (dtype := checkpoint.dtype(raw)).is_floating_point or dtype.itemsize < 2:
            problems.append(f"{raw} is {dtype} in the base: name the full-precision one")
        else:
            updates[raw] = update
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"adapter {source} does not fit the base {checkpoint.source}: {listed}")
    return updates
