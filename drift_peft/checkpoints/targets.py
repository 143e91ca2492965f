"""PEFT's target_modules for exactly the language model's projections, checked against what PEFT makes of them.

PEFT rewrites the configs of mixture-of-experts models for the layout that transformers 5 gave their experts: names of
the former expert layers become parameters, and an expression becomes the last parts of the names that it matches. It
also renames the weights of an adapter that it loads, as transformers renames those of a model. What comes of either is
asked of PEFT itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..arguments import check_type, plain
from ..warn import warn
from .decoder import Decoder, shared_weights
from .peft_names import convert_peft_adapter_state_dict_for_transformers, convert_peft_config_for_transformers


def language_model_targets(
    model: nn.Module, names: Collection[str] | None = None, layers: Iterable[int] | int | None = None
) -> str | list[str]:
    """PEFT's `target_modules` that hits exactly the language model's projections.

    Args:
        model: a transformers model, vision-language or text only, or a PEFT model around one.
        names: canonical weight names to keep, such as a prior's; all projections if None.
        layers: indices of the layers to keep, as the model counts them; all if None.

    Returns:
        A regular expression; the full names of the modules where PEFT would take an expression for something else.
        Modules that cannot be adapted are left out, with a warning that names them and says why.

    Raises:
        ValueError: no module would be hit, or there is no such layer.

    Example:
        >>> attention = ["layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"]
        >>> config = LoraConfig(target_modules=language_model_targets(vlm, attention))
        >>> len(get_peft_model(vlm, config).targeted_module_names)
        2
    """
    check_type("model", model, nn.Module)
    if isinstance(names, (str, Path)):
        raise ValueError(
            f"names must be a list of weights, such as ['layers.0.self_attn.q_proj.weight'], got {str(names)!r}"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = Decoder(base)
    keep = None if names is None else set(names)
    if layers is not None:
        layers = plain(layers)
        layers = [layers] if isinstance(layers, int) else [*layers]
        if unknown := [i for i in layers if type(i) is not int or not 0 <= i < len(decoder.layers)]:
            last = len(decoder.layers) - 1
            raise ValueError(f"layers names {unknown[0]!r}, and {type(base).__name__} has those from 0 to {last}")
    candidates = {}  # module -> index of its layer, and its path in there
    for module, canonical in decoder.projections.items():
        index, _, path = module.removeprefix(f"{decoder.path}.").partition(".")
        if (keep is None or canonical in keep) and (layers is None or int(index) in layers):
            candidates[module] = int(index), path
    if not candidates:
        of = "" if keep is None else f" among the {len(keep)} names given"
        of += "" if layers is None else f" in its layers {layers}"
        raise ValueError(
            f"{type(base).__name__} has no attention or MLP projection in its language model{of}: pass target_modules "
            "yourself"
        )
    lost = _lost_by_peft(base, candidates)
    shared = shared_weights(base)
    lost |= {
        m: "PEFT merges their adapters into weights that other modules share"
        for m in candidates
        if f"{m}.weight" in shared
    }
    lost |= dict.fromkeys(past_adapters(base, candidates), "Mamba's fused kernels read their weights past an adapter")
    for module in lost:
        del candidates[module]
    for targets in (_expression(decoder.path, candidates.values()), [*candidates]):
        if candidates and as_peft_reads(base, targets) == {*candidates}:
            break
    else:
        targets = [module for module in candidates if _converted(base, [module])]
        lost |= {module: "PEFT takes their names for expert stacks" for module in candidates if module not in targets}
    for why in dict.fromkeys(lost.values()):
        modules = [module for module in lost if lost[module] == why]
        message = f"{len(modules)} projections, such as {modules[0]}, cannot be adapted: {why} in models of type "
        if not targets:
            raise ValueError(f"{message}{base.config.model_type}, and of {type(base).__name__} nothing is left")
        warn(f"{message}{base.config.model_type}")
    return targets


def as_peft_reads(model: nn.Module, targets: str | Iterable[str]) -> set[str] | None:
    """The modules that PEFT adapts for these `target_modules`; None where it would adapt parameters, or refuses."""
    config = _converted(model, targets)
    return config and {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}


def past_adapters(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The out_proj of Mamba among these: its fused kernels multiply with the weight itself in training, so that an
    adapter never moves. PEFT refuses it in the types that it knows by name. Mamba has D, linear attention has not."""
    mixers = {name: name.removesuffix(".out_proj") for name in modules if name.endswith(".out_proj")}
    return [name for name, mixer in mixers.items() if hasattr(model.get_submodule(mixer), "D")]


def _lost_by_peft(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Those of the modules whose adapters PEFT would save and not load again -> why."""
    keys = {f"base_model.model.{module}.lora_A.weight": module for module in modules}
    state = {key: torch.empty(1, 1) for key in keys}
    try:
        loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(state))
    except (ValueError, RuntimeError, KeyError):  # it joins what it takes for several experts
        loaded = {}
    return {module: "PEFT loads their adapters under other names" for key, module in keys.items() if key not in loaded}


def _converted(model: nn.Module, targets: str | Iterable[str]) -> LoraConfig | None:
    config = LoraConfig(target_modules=targets)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # of several layers that became one parameter, it names one
        return None
    return None if config.target_parameters else config


def _expression(path: str, places: Iterable[tuple[int, str]]) -> str:
    """A regular expression for these modules, in which layers with equal sets of them stand together."""
    inside, alike = defaultdict(list), defaultdict(list)
    for index, module in places:
        inside[index].append(module)
    for index, modules in sorted(inside.items()):
        alike[tuple(sorted(modules))].append(index)
    prefix = re.escape(f"{path}.")
    return "|".join(
        rf"{prefix}({'|'.join(map(str, indices))})\.({'|'.join(map(re.escape, modules))})"
        for modules, indices in alike.items()
    )
