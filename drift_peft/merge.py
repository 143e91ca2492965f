"""A LoRA adapter and its full-precision base on disk -> a standalone checkpoint on disk.

The model is never in memory: each shard is copied and the changed tensors are overwritten in the copy, one at a time,
so that everything else stays byte for byte what it was.
"""

import gc
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from .adapter import adapter_folder, adapter_updates
from .checkpoint import Checkpoint
from .standalone import replaced_when_complete, write_model
from .update import LowRank, Update

VERIFY_TOKENS = 32


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


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge a LoRA adapter (ours or stock PEFT's) into its full-precision base: W' = W + s·B·A.

    DoRA's magnitudes, `modules_to_save`, biases, trained tokens, and adapters on embedding, head and vision tower are
    merged too. W' is computed in fp32 and cast once to the dtype of W. Shards, tensor names and all tensors without an
    adapter stay as they are in the base folder; tokenizer, processor, chat template and configs come from there too.
    Works in `<output>.partial/`, which is renamed when it is complete and is gone if anything fails.

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
        ValueError: the base is no full-precision model; the adapter has a part that cannot be merged, or that does not
            fit the base; nothing changed; a merged weight is not finite; or the verification failed.
    """
    with replaced_when_complete(Path(output), overwrite, sources=(base, adapter)) as folder:
        folder_of_adapter = adapter_folder(adapter)
        if Path(base, "adapter_config.json").is_file():
            raise ValueError(f"base {base} is an adapter itself: name the full-precision base that it was trained on")
        checkpoint = Checkpoint(base)
        updates = adapter_updates(folder_of_adapter, checkpoint, str(adapter))
        change = write_model(checkpoint, folder, updates, lambda raw, W: updates[raw].blocks(W), progress)
        if change == 0:
            zero = not any(isinstance(u, LowRank) and u.B.any() for u in updates.values())
            why = "its lora_B are zero, as before training" if zero else "all is lost in rounding to the base's dtype"
            raise ValueError(f"the adapter changes no weight of {checkpoint.source}: {why}")
        logits_error = _verify(checkpoint, folder_of_adapter, folder, updates) if verify else None
    modules = {update.module for update in updates.values()}
    return MergeReport(Path(output), len(modules), len(checkpoint.keys), change, logits_error)


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
