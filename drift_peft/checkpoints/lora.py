"""What a LoRA adapter makes of which tensor of a checkpoint, without loading a model, and an expert that is given as an
adapter on a base.

An adapter carries the in-memory names of the transformers version that trained it, and a checkpoint those of the one
that wrote it. Names of the language model become canonical ones; all others, such as those of the vision tower,
through the renaming that transformers does itself when it loads the checkpoint.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from ..arguments import listed, shortened
from ..warn import warn
from .adapter import CONFIG, DIVERGED, FILES, IN_MEMORY, TIED, named_adapters, read_adapter_config, read_updates
from .checkpoint import Checkpoint
from .decoder import shared_weights
from .hub import Repository, folder_of, split_revision
from .naming import EMBEDDING, HEAD, canonical_name, module_kind, unwrapped
from .output import write_tensors
from .promised import refuse_incomplete
from .update import LowRank, Rows, Update, Whole, is_finite
from .watch import Watch

DRIFT_CONFIG = "drift_config.json"  # beside it, where the adapter was steered
# In safetensors' metadata of W + λΔ that we made ourselves, of full-precision weights. The mark stands in the tensors'
# file: training and saving again drops it there. In a file beside it, it would outlive the weights that it speaks of.
UNTRAINED = {"format": "pt", "drift_peft": "made without training"}
LISTED = 5  # problems that an error spells out


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
                f"adapter {adapter} adapts {base}, which cannot be found: write the folder or hub id of that model "
                f"into base_model_name_or_path of its {CONFIG} ({error})"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{error}; adapter {adapter} names it as its base: write the folder of another into "
                f"base_model_name_or_path of its {CONFIG}"
            ) from error
        self.base = super().origin
        self._updates = adapter_updates(self._adapter, self, str(adapter), expert=True)
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
        return torch.float32 if raw in self._updates else self.stored_dtype(raw)

    def tensor(self, raw: str) -> torch.Tensor:
        W = self.stored_tensor(raw)
        if raw not in self._updates:
            return W
        return torch.cat([*self._updates[raw].blocks(W)]).reshape(W.shape)


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


def adapter_updates(folder: Path, checkpoint: Checkpoint, source: str, expert: bool = False) -> dict[str, Update]:
    """Raw key of the checkpoint -> what the adapter adds to it; of an expert, without what is in no preset.

    Raises:
        FileNotFoundError: the folder lacks the adapter's weights.
        ValueError: the adapter has a part that cannot be merged, by name, or lacks one that its config promises; or not
            each of its modules finds one tensor of its shape: all that do not are listed.
    """
    adapter, config, find = read_updates(folder), read_adapter_config(folder), _tensor_finder(checkpoint)
    # Such as single experts, where the class has them in one stack.
    beside = [n for n in adapter if expert and (at := find(n))[0] and not at[1] and module_kind(at[0]) is None]
    if beside:
        warn(f"adapter {source} also trains {shortened(beside, 1)}, which no prior steers: they stay as in its base")
        adapter = {name: update for name, update in adapter.items() if name not in beside}
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


def write_adapter(
    folder: Path, base: Checkpoint, tensors: dict[str, torch.Tensor], untrained: bool, **settings: Any
) -> None:
    """Write a plain LoRA adapter of a model, for stock PEFT.

    Args:
        tensors: under PEFT's names, `base_model.model.….lora_A.weight` and so on.
        untrained: whether they are λΔ as we made it, of full-precision weights.
        settings: of its LoraConfig: r, lora_alpha, target_modules, …
    """
    write_tensors(folder / FILES[1], tensors, UNTRAINED if untrained else {"format": "pt"})
    LoraConfig(
        base_model_name_or_path=base.source,
        revision=base.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        **settings,
    ).save_pretrained(folder)


def _match(checkpoint: Checkpoint, adapter: dict[str, Update], source: str) -> dict[str, Update]:
    """Raw key of the base -> its update. Every update finds one tensor of its shape, or all that do not are listed."""
    problems, updates, way_out = [], {}, ""
    find, shared = _tensor_finder(checkpoint), shared_weights(checkpoint.model)
    convolutions = [name for name, module in checkpoint.model.named_modules() if isinstance(module, Conv1D)]
    transposed = {checkpoint.in_memory.get(f"{name}.weight") for name in convolutions}
    ends: dict[str, Update] = {}  # embedding and head as they were trained, where these are one weight
    for name, update in adapter.items():
        canonical, raw = find(name)
        if canonical in TIED and not isinstance(update, Rows) and checkpoint.tied:
            ends[canonical] = update
            canonical, raw = find(EMBEDDING)
            if len(ends) == 2 and _alike(*ends.values()):  # PEFT's ensure_weight_tying writes it twice
                continue
        if raw in transposed and isinstance(update, LowRank):  # W [in, out] + s·(B·A)ᵀ
            if update.magnitude is not None:
                raise ValueError(f"adapter {source} uses DoRA on the transposed weight of {update.module}; {IN_MEMORY}")
            update = replace(update, A=update.B.mT, B=update.A.mT)
        if raw is None:
            problems.append(f"the base has no {canonical or name}")
        elif unwrapped(name) in shared:
            problems.append(f"other modules share the weight of {update.module}, and would change with it")
        elif raw in updates:
            problems.append(f"{update.module} and {updates[raw].module} are the same weight {canonical or name}")
            if len(ends) == 2:
                way_out = "; ensure_weight_tying=True of PEFT 0.19 or newer would have trained them as one"
                if all(isinstance(end, Whole) for end in ends.values()):  # factors would all be added to one weight
                    way_out += f"; to keep both, {IN_MEMORY}, and set its config.tie_word_embeddings=False"
        elif expected := update.misfit(checkpoint.shape(raw)):
            shape = list(checkpoint.shape(raw))
            problems.append(f"{raw} is {shape} in the base and {list(expected)} in the adapter")
            if canonical in TIED and shape[1:] == list(expected[1:]):
                way_out = (
                    f"; call resize_token_embeddings({expected[0]}) on the base, save it, and name that folder as the "
                    f"base (of an expert, in base_model_name_or_path of its {CONFIG})"
                )
        elif wrong := checkpoint.quantization_sign(raw):
            problems.append(f"{raw} {wrong} in the base: name the full-precision one")
        elif isinstance(update, Whole) and not is_finite(update.value) and is_finite(checkpoint.tensor(raw)):
            raise ValueError(f"adapter {source} holds NaN or infinity in {name}: {DIVERGED}")
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
        message = f"adapter {source} does not fit the base {checkpoint.source}: {listed(problems, LISTED)}"
        raise ValueError(message + way_out)
    return updates


def _alike(one: Update, other: Update) -> bool:
    """Do both replace a tensor by the same?"""
    parts = [{key: value for key, value in vars(update).items() if key != "module"} for update in (one, other)]
    return type(one) is type(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b
        for a, b in zip(*(part.values() for part in parts), strict=True)
    )


def _tensor_finder(checkpoint: Checkpoint) -> Callable[[str], tuple[str | None, str | None]]:
    """Name of a tensor in an adapter -> its canonical name, if it is the language model's, and its raw key."""
    decoder = checkpoint.decoder

    def find(name: str) -> tuple[str | None, str | None]:
        name = unwrapped(name)
        canonical = decoder.name(name)
        if canonical not in decoder.kinds:  # another version of transformers named the modules of the model
            canonical = canonical_name(name, decoder.skipped)
        if canonical == EMBEDDING and canonical not in checkpoint.language_model and checkpoint.tied:
            return canonical, checkpoint.language_model.get(HEAD)  # some files hold the one weight under its name
        if canonical:
            # What transformers now makes of others, such as a stack of experts, was a module of its own in older
            # versions.
            return canonical, checkpoint.language_model.get(canonical, name if name in checkpoint.keys else None)
        return None, checkpoint.in_memory.get(name) or checkpoint.in_memory.get(checkpoint.layout.name(name))

    return find
