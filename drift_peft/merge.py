"""A LoRA adapter and its full-precision base on disk -> a standalone checkpoint on disk.

The model is never in memory: each shard is copied and the changed tensors are overwritten in the copy, one at a time,
so that everything else stays byte for byte what it was. Names go through `canonical_name`, because an adapter carries
the in-memory names of the transformers version that trained it, and a checkpoint those of the one that wrote it.
"""

import contextlib
import gc
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from .checkpoint import INDEX, Checkpoint, download, split_revision
from .naming import canonical_name, cross_attention_layers
from .output import partial_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What a model folder needs beside its weights: tokenizer, processor, chat template, remote code, licence.
STANDALONE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
STANDALONE += ("additional_chat_templates/*.jinja",)
NOT_COPIED = ("*.index.json", "trainer_state.json")  # other copies of the weights, the base's own training
# Starts that leave the base weight as it is; PiSSA and its like move a part of it into the adapter.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
IN_MEMORY = "merge it in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
VERIFY_TOKENS = 32
BLOCK = 1 << 22  # elements that are merged at once


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` did.

    Attributes:
        output: the merged folder.
        modules: adapter modules that were merged, which are all that the adapter has.
        tensors: tensors in the merged folder.
        relative_change: ‖W' − W‖/‖W‖ (Frobenius) over all merged weights, as stored.
        logits_error: ‖logits of the merged folder − logits of base + adapter‖/‖the latter‖; None without verify.
    """

    output: Path
    modules: int
    tensors: int
    relative_change: float
    logits_error: float | None


@dataclass(frozen=True)
class Update:
    """s·B·A for one weight W [out, in]: A [r, in], B [out, r] as stored, memory-mapped."""

    module: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge a plain LoRA adapter (ours or stock PEFT's) into its full-precision base: W' = W + s·B·A.

    The sum is taken in fp32 and cast once to the dtype of W. Shards, tensor names and all tensors without an adapter
    stay as they are in the base folder; tokenizer, processor, chat template and configs come from there too. Works in
    `<output>.partial/`, which is renamed when it is complete and is gone if anything fails.

    Args:
        base: folder or hub id (`id@revision`) of the model in full precision, whatever it was quantized to in training.
        adapter: folder or hub id of the adapter.
        output: folder to write.
        verify: also compare the logits of base + adapter (by PEFT) with those of the merged folder, in fp32 on the
            CPU. This loads the whole model, twice in turn.
        overwrite: replace an existing model folder, once the new one is complete.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError, FileNotFoundError, OSError: the output, the adapter or the base cannot be written or read.
        ValueError: the base is no full-precision model; the adapter has a part that plain addition cannot merge, or
            that does not fit the base; nothing changed; a merged weight is not finite; or the verification failed.
    """
    with _replaced_when_complete(Path(output), overwrite, sources=(base, adapter)) as folder:
        adapter_folder = _adapter_folder(adapter)
        if Path(base, "adapter_config.json").is_file():
            raise ValueError(f"base {base} is an adapter itself: name the full-precision base that it was trained on")
        checkpoint = Checkpoint(base)
        updates = _match(checkpoint, _read_adapter(adapter_folder, checkpoint), str(adapter))
        companions = _companions(checkpoint)
        try:
            change = _write_shards(checkpoint, updates, folder, progress)
            for file in companions:
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.folder / file, folder / file)
        except OSError as error:
            raise OSError(f"output {output} could not be written: {error.strerror or error}") from error
        logits_error = _verify(checkpoint, adapter_folder, folder, updates) if verify else None
    return MergeReport(Path(output), len(updates), len(checkpoint.keys), change, logits_error)


@contextlib.contextmanager
def _replaced_when_complete(output: Path, overwrite: bool, sources: tuple[str | Path, ...]) -> Iterator[Path]:
    """`<output>.partial/` to work in, renamed to the output at the end, or gone if anything failed."""
    output = output.resolve()
    if output.exists():
        if not overwrite:
            raise FileExistsError(f"output {output} exists: name another folder, or pass overwrite=True (--overwrite)")
        if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
            raise FileExistsError(f"output {output} exists and is no model folder, so it is not overwritten")
        for source in sources:
            if Path(source).exists() and Path(source).resolve().is_relative_to(output):
                raise FileExistsError(f"output {output} holds {source}, which is merged: name another folder")
    old = output.with_name(output.name + ".replaced")
    with partial_folder(output) as partial:
        yield partial
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        try:
            os.replace(partial, output)
        except OSError:
            if old.exists():
                os.replace(old, output)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _adapter_folder(adapter: str | Path) -> Path:
    folder = Path(adapter) if Path(adapter).exists() else download(*split_revision(str(adapter)), ADAPTER_FILES)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter {adapter} has no adapter_config.json: name what save_pretrained wrote")
    return folder


def _read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, list[Update]]:
    """Canonical weight name -> updates. What plain addition cannot merge is refused by name."""
    config = LoraConfig.from_pretrained(str(folder))
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
    safe, pickled = (folder / name for name in ADAPTER_FILES[1:])
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
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


@torch.no_grad()
def _write_shards(checkpoint: Checkpoint, updates: dict[str, Update], folder: Path, progress: bool) -> float:
    """Copy every shard and overwrite the updated tensors in the copy. Returns ‖W' − W‖/‖W‖ over these."""
    change = norm = 0.0  # squares
    done, zero = 0, True
    with tqdm(total=len(updates), desc="merging", unit="weight", disable=not progress) as bar:
        for file in checkpoint.files:
            shutil.copyfile(file, folder / file.name)
            with open(folder / file.name, "r+b") as shard:
                offsets = _tensor_offsets(shard)
                for raw in (raw for raw in updates if checkpoint.keys[raw] == file):
                    bar.set_postfix_str(raw)
                    shard.seek(offsets[raw])
                    squares = _write_merged(shard, raw, checkpoint.tensor(raw), updates[raw])
                    change, norm = change + squares[0], norm + squares[1]
                    done, zero = done + 1, zero and not updates[raw].B.any()
                    bar.update()
    if done != len(updates):
        raise ValueError(f"only {done} of {len(updates)} adapter modules were merged into {checkpoint.source}")
    if change == 0:
        why = "its lora_B are zero, as before training" if zero else "all of it is lost in rounding to the base's dtype"
        raise ValueError(f"the adapter changes no weight of {checkpoint.source}: {why}")
    return math.sqrt(change / norm)


def _write_merged(shard: BinaryIO, raw: str, W: torch.Tensor, update: Update) -> tuple[float, float]:
    """Write W' = W + s·B·A where the file stands, a block of rows at a time. Returns ‖W' − W‖² and ‖W‖²."""
    change = norm = 0.0
    A, B = update.A.float(), update.B.float()
    rows = max(1, BLOCK // W.shape[1])
    for block, B_block in zip(W.split(rows), B.split(rows), strict=True):  # [rows, in], [rows, r]
        before = block.float()
        merged = torch.addmm(before, B_block, A, alpha=update.scaling).to(W.dtype)
        shard.write(merged.flatten().view(torch.uint8).numpy())
        change += torch.linalg.vector_norm(merged.float() - before).item() ** 2
        norm += torch.linalg.vector_norm(before).item() ** 2
    if not math.isfinite(change):
        raise ValueError(f"{raw} is not finite after the merge: NaN, Inf or an overflow of {W.dtype}")
    return change, norm


def _tensor_offsets(shard: BinaryIO) -> dict[str, int]:
    """Where in the file each tensor's bytes start. The safetensors format: the header's length as a little-endian
    64-bit number, the header as JSON, and the tensors, whose `data_offsets` count from the header's end."""
    start = int.from_bytes(shard.read(8), "little")
    header = json.loads(shard.read(start))
    return {name: 8 + start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Files beside the weights that make the folder stand alone, relative to it. config.json comes last: without it
    no leftover passes for a model."""
    folder = checkpoint.folder
    if checkpoint.revision:
        folder = download(checkpoint.source, checkpoint.revision, STANDALONE)
    files = {file for pattern in STANDALONE for file in folder.glob(pattern) if file.is_file()}
    files = {file for file in files if file.name == INDEX or not any(map(file.match, NOT_COPIED))}
    return sorted((file.relative_to(folder) for file in files), key=lambda file: (file.name == "config.json", file))


@torch.no_grad()
def _verify(checkpoint: Checkpoint, adapter: Path, merged: Path, updates: dict[str, Update]) -> float:
    """Relative error of the merged folder's logits against those of base + adapter by PEFT, in fp32 on the CPU.

    Each weight was rounded once, by at most u = eps/2 of itself. The roundings of n weights are independent, so their
    sum stays within √n·u of the logits; the floor is what fp32 makes of another order of summation. And rounding to
    the nearest moves no weight farther than the adapter did, so the base alone must be off by more.
    """
    base = _load(checkpoint, checkpoint.folder)
    try:
        with warnings.catch_warnings():  # PEFT only warns when a name finds no weight
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu").eval()
    except (ValueError, RuntimeError, UserWarning) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"PEFT cannot load {adapter} onto its base to verify the merge: {reason}") from error
    settings = checkpoint.config.to_dict().items()
    special = [value for key, value in settings if key.endswith(("_token_id", "_token_index"))]  # images have no text
    plain = [i for i in range(checkpoint.text_config.vocab_size) if i not in special]
    tokens = torch.tensor([plain[:: max(1, len(plain) // VERIFY_TOKENS)][:VERIFY_TOKENS]])
    expected = adapted(input_ids=tokens).logits
    with adapted.disable_adapter():
        without = adapted(input_ids=tokens).logits
    del base, adapted
    gc.collect()
    found = _load(checkpoint, merged)(input_ids=tokens).logits
    gc.collect()  # Windows cannot rename a folder with a mapped file
    error, effect = (((other - expected).norm() / expected.norm()).item() for other in (found, without))
    dtype = max((checkpoint.dtype(raw) for raw in updates), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = min(effect, max(1e-4, math.sqrt(len(updates)) * torch.finfo(dtype).eps / 2))
    if not error <= tolerance:
        raise ValueError(
            f"the merged model's logits are {error:.2%} off those of base + adapter, and rounding to {dtype} explains "
            f"at most {tolerance:.2%}: the merge into {checkpoint.source} went wrong"
        )
    if error > effect / 2:
        warnings.warn(
            f"Rounding to {dtype} undoes much of this adapter: the merged model's logits are {error:.2%} off those of "
            f"base + adapter, and those of the base alone {effect:.2%}. Serve it unmerged, or train it further.",
            stacklevel=3,
        )
    return error


def _load(checkpoint: Checkpoint, folder: Path) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a checkpoint without a head gets a random one, the same for both
        model, info = checkpoint.auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if lost := sorted(key for key in info["missing_keys"] if "lm_head" not in key):
        raise ValueError(f"transformers does not find {lost[0]} in {folder}, so the merge cannot be verified with it")
    return model.eval()
