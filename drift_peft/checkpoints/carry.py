"""A LoRA adapter under the names of another model: what was trained on the text sibling, as an adapter of the VLM.

The names are those that PEFT has on the class which transformers builds of the VLM's configuration; vLLM and
llama.cpp's converter take these. But llama.cpp reads one α for all modules, over the rank of each tensor: it knows
neither PEFT's patterns nor rank-stabilized scaling (vLLM 0.33 knows both). So every module gets the largest rank, by
rows and columns of zeros, and the scaling that most of them have; what another one has more or less is in its lora_B,
in fp32. The update s·B·A of each stays what it was.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from torch.nn.functional import pad

from ..arguments import listed
from .adapter import read_adapter_config, read_updates
from .checkpoint import Checkpoint
from .decoder import is_linear
from .lora import adapter_folder, made_without_training, write_adapter
from .match import in_vocabulary
from .naming import canonical_name
from .promised import refuse_incomplete
from .targets import as_peft_reads, language_model_targets
from .update import LowRank, Rows, Update, Whole

LISTED = 5  # problems that an error spells out
_OF_A_VLM = re.compile(r"\b(?:language_model|text_model)\.")


@torch.no_grad()
def carry_adapter(adapter: str | Path, checkpoint: Checkpoint, folder: Path) -> int:
    """Write a plain LoRA adapter as one of another model, for stock PEFT. Returns the number of its modules.

    Args:
        adapter: folder, hub id or `id@revision`; trained on the text sibling, or on the model itself.
        checkpoint: the model that shall have it.
        folder: where to write it, made if need be.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter has a part that is more than s·B·A of a linear layer, by name; not each of its modules
            has a counterpart of its shape in the model, with the names on both sides; it lacks what its config
            promises; or it adds nothing.
    """
    folder_of_adapter = adapter_folder(adapter)
    updates = read_updates(folder_of_adapter)
    _refuse_more_than_lora(updates, adapter)
    find = _module_finder(checkpoint)

    def weight_of(name: str) -> str | None:
        module, _, attribute = name.rpartition(".")
        found = find(module)
        return found and f"{found}.{attribute}"

    factors = _placed(updates, adapter, checkpoint, find)
    refuse_incomplete(read_adapter_config(folder_of_adapter), checkpoint.model, updates, str(adapter), weight_of)
    if not (scalings := Counter(u.scaling for u in factors.values() if u.scaling and u.B.any())):
        raise ValueError(f"adapter {adapter} adds nothing: its lora_B or its lora_alpha are zero, as before training")
    (scaling, _), *_ = scalings.most_common(1)
    rank = max(len(update.A) for update in factors.values())
    tensors = {}
    for module, update in factors.items():
        lacking = rank - len(update.A)
        B = update.B if update.scaling == scaling else update.B.float() * (update.scaling / scaling)
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(update.A, (0, 0, 0, lacking)).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(B, (0, lacking)).contiguous()
    folder.mkdir(exist_ok=True)
    # One of the model itself, under its own names, was trained on it, and how that was loaded nothing says.
    of_another = not any(module == update.module for module, update in factors.items())
    untrained = of_another or made_without_training(folder_of_adapter)
    targets = _targets(checkpoint, [*factors], adapter)
    alpha = _plain(scaling * rank)
    write_adapter(folder, checkpoint, tensors, untrained, r=rank, lora_alpha=alpha, target_modules=targets)
    return len(factors)


def scale_adapter(folder: Path, scale: float) -> None:
    """Multiply what `carry_adapter` has written by a number: in lora_alpha, so that no tensor changes."""
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_alpha = _plain(scale * config.lora_alpha)
    config.save_pretrained(folder)


def _plain(number: float) -> float | int:
    """Whole where it is: other readers of the file take lora_alpha for an integer."""
    whole = round(number)
    return whole if math.isclose(number, whole, rel_tol=1e-12) else number  # 16/49·49 is 15.999999999999998


def _refuse_more_than_lora(updates: dict[str, Update], adapter: str | Path) -> None:
    for name, update in updates.items():
        if isinstance(update, Whole):
            part = f"{name} itself (modules_to_save, bias or lora_bias, or saved with the embedding)"
        elif isinstance(update, Rows):
            part = f"rows of {name} (trainable_token_indices)"
        elif update.magnitude is not None:
            part = f"the norms of the rows of {name} (use_dora)"
        elif in_vocabulary(canonical_name(name) or ""):
            part = f"an update of {name}, whose rows are tokens"
        elif update.start is not None:
            part = f"{name} of its own base"
        else:
            continue
        raise ValueError(
            f"adapter {adapter} holds {part}, which has no meaning beside another model's weights: name the model "
            "that it was trained on as reference (--reference), and it is taken as a fine-tune of that"
        )


def _placed(
    updates: dict[str, LowRank], adapter: str | Path, checkpoint: Checkpoint, find: Callable[[str], str | None]
) -> dict[str, LowRank]:
    """Module of the model -> its factors."""
    projections = checkpoint.decoder.projection_modules
    factors: dict[str, LowRank] = {}
    problems = []
    for name, update in updates.items():
        module = find(update.module)
        if module is None:
            near = len(problems) < LISTED and difflib.get_close_matches(canonical_name(name) or name, projections, 1, 0)
            nearest = f" (the nearest name is {projections[near[0]]})" if near else ""
            problems.append(f"{update.module} is not there{nearest}")
            continue
        layer = checkpoint.model.get_submodule(module)
        shape = layer.out_features, layer.in_features
        if module in factors:
            problems.append(f"{update.module} and {factors[module].module} are both {module}")
        elif expected := update.misfit(shape):
            problems.append(f"{update.module} is {list(expected)} in the adapter, and {module} is {list(shape)}")
        factors[module] = update
    if problems:
        raise ValueError(
            f"adapter {adapter} does not fit {checkpoint.source} in {len(problems)} of its {len(updates)} modules: "
            f"{listed(problems, LISTED)}"
        )
    return factors


def _module_finder(checkpoint: Checkpoint) -> Callable[[str], str | None]:
    """Module of the text sibling, or of the model itself -> that of the model, if it is there and linear."""
    decoder = checkpoint.decoder
    linear = {name for name, module in checkpoint.model.named_modules() if is_linear(module)}

    def find(module: str) -> str | None:
        if module in linear:
            return module
        # The text sibling has no layers of cross-attention, and counts those that it has.
        skipped = decoder.skipped if _OF_A_VLM.search(module) else ()
        return decoder.projection_modules.get(canonical_name(f"{module}.weight", skipped))

    return find


def _targets(checkpoint: Checkpoint, modules: list[str], adapter: str | Path) -> str | list[str]:
    """PEFT's target_modules for exactly these."""
    model, projections = checkpoint.model, checkpoint.decoder.projections
    if {*modules} <= {*projections}:
        targets = language_model_targets(model, [projections[module] for module in modules])
    else:
        targets = modules
    if lost := {*modules} ^ (as_peft_reads(model, targets) or set()):
        raise ValueError(
            f"PEFT cannot adapt {len(lost)} of the modules of adapter {adapter} on a {type(model).__name__}, such as "
            f"{min(lost)}: take it as a fine-tune with a reference (--reference), merged (--merged)"
        )
    return targets
