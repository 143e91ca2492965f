"""Does an adapter's file hold all that its config promises? PEFT itself is asked, on the class without weights.

What is not there would be merged as if it had never been trained. What the config promises is certain where the file
has the class's own names: PEFT then matches here as it did in training. Under the names of another class or version
only the language model's weights are told apart, and not even these by an expression for the other names.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Hashable, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from ..arguments import shortened
from ..warn import warn
from .decoder import Decoder
from .naming import unwrapped
from .update import LowRank, Update

PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias"
    r"|token_adapter\.trainable_tokens_delta|base_layer\.(?:weight|bias))"
)
TARGETS, SAVED, BIAS, TOKENS = "target_modules", "modules_to_save", "bias", "trainable_token_indices"
ON_PURPOSE = {  # field of the config -> what makes it promise less
    TARGETS: ", or name what was left out on purpose in exclude_modules there",
    SAVED: ", or take what was left out on purpose from there",
    TOKENS: ", or take what was left out on purpose from there",
    BIAS: "",
}
_LAYER = re.compile(r"\.\d+(?=\.)")


def refuse_incomplete(
    config: LoraConfig,
    model: nn.Module,
    names: Mapping[str, Update],
    source: str,
    weight_of: Callable[[str], Hashable | None] = lambda name: name,
) -> None:
    """Refuse an adapter whose file lacks what its config promises.

    Args:
        config: the adapter's.
        model: the class that it is for, without weights.
        names: tensors that it changes, as it calls them, such as `model.layers.0.mlp.up_proj.weight` -> how.
        source: what the user calls it.
        weight_of: name, of the adapter or of the class -> which weight that is; None if there is none.

    Raises:
        ValueError: it lacks a tensor, with the field that promises it.
    """
    adapted = {weight_of(unwrapped(name)) for name, update in names.items() if isinstance(update, LowRank)} - {None}
    names, here, decoder = {*map(unwrapped, names)}, {*model.state_dict()}, Decoder(model)
    own = names <= here
    if not own and decoder.skipped:  # whose layers the names may count or not
        return
    held = {weight_of(name) for name in names}
    excluded = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules or ()
    whole_names = any("." in end for end in excluded)
    promised = None if whole_names and not own else _promised(config, model)
    if promised is None:  # an expression is for other names, so what is there is taken for all that it matches
        modules = [name.rpartition(".")[0] for name in here if weight_of(name) in adapted]
        promised = _promised(config, model, modules) or {}
    kinds = {_LAYER.sub("", name) for name in here if weight_of(name) in held}
    lost, towers = [], []
    for name, field in promised.items():
        language = decoder.name(name) is not None
        if weight_of(name) in {None, *held} or not (own or language):
            continue
        if field == TARGETS and config.target_modules == "all-linear" and _LAYER.sub("", name) not in kinds:
            continue  # PEFT writes their names instead, and others who write this do not mean all
        by_targets = field == TARGETS or (field == BIAS and config.bias == "lora_only")
        tower = by_targets and not language and not any(decoder.name(n) is None for n in names)
        (towers if tower else lost).append((name, field))
    if lost:
        absent, field = [name for name, _ in lost], lost[0][1]
        raise ValueError(
            f"adapter {source} lacks {shortened(absent, 1)}, which {field} in its adapter_config.json promises: save "
            f"or fetch it again{ON_PURPOSE[field]}"
        )
    if towers:  # as tools other than PEFT write it, which adapt the language model alone
        warn(
            f"adapter {source} changes the language model alone, and target_modules in its adapter_config.json hit "
            f"{len(towers)} modules beside it, such as {towers[0][0].rpartition('.')[0]}, which stay the base's"
        )


def _promised(config: LoraConfig, model: nn.Module, targets: list[str] | None = None) -> dict[str, str] | None:
    """Tensor that PEFT trains, as the model calls it -> field of the config that says so; None if PEFT refuses it.

    `targets`: instead of the config's.
    """
    config = copy.deepcopy(config)
    # These name no tensor, and PEFT would look at weights for them, or import a module that the file names.
    config.init_lora_weights, config.use_dora = False, False
    config.eva_config = config.arrow_config = config.megatron_config = config.base_model_name_or_path = None
    config.rank_pattern, config.alpha_pattern = {}, {}
    if targets is not None:
        config.target_modules = targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    try:
        # Not by low_cpu_mem_usage, which makes new modules of all threads on the meta device.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # what it has to say it says where the adapter is loaded
            wrapped = PeftModel(copy.deepcopy(model), config)
            state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
        return None
    promised = {}
    for key in state:
        name = key.removeprefix("base_model.model.")
        if match := PART.fullmatch(name):
            part = match["part"]
            attribute = "bias" if part.endswith(".bias") else "weight"
            field = TOKENS if part.startswith("token") else BIAS if part == "base_layer.bias" else TARGETS
            promised[f"{match['module']}.{attribute}"] = field
        else:
            saved = any(f"{end}." in name for end in config.modules_to_save or ())  # ends of names, to PEFT
            if saved or name.endswith(".bias"):
                promised[name] = SAVED if saved else BIAS
    return promised
