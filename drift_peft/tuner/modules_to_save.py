"""Modules to save, which PEFT copies for each adapter to train the copies: which they will be, and which cannot be."""

from __future__ import annotations

from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..checkpoints import module_kind, unwrapped
from .names import canonical_namer


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that PEFT will copy, which end as `modules_to_save` says."""
    ends = tuple(config.modules_to_save or ())
    return [name for name, _ in model.named_modules(remove_duplicate=False) if ends and name.endswith(ends)]


def tensors_to_train(model: nn.Module, config: LoraConfig, adapted: Iterable[str]) -> list[str]:
    """Canonical names of the tensors that will be trained themselves: what is in `modules_to_save`, and biases.

    Args:
        adapted: names of the modules that LoRA will adapt.
    """
    canonical_name, saved = canonical_namer(model), tuple(f"{name}." for name in saved_modules(model, config))
    of_layers, names = {f"{name}.bias" for name in adapted} if config.bias == "lora_only" else (), []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if canonical := canonical_name(name):
            with_layer = config.bias == "all" or name in of_layers
            if name.startswith(saved) or (with_layer and module_kind(canonical) == "bias"):
                names.append(canonical)
    return [*dict.fromkeys(names)]  # copies have the names of what they were made of


def check_saved(model: nn.Module, config: LoraConfig, adapted: Iterable[str]) -> None:
    """Refuse modules to save that PEFT cannot copy and train, while the model is still as it was.

    Args:
        adapted: names of the modules that LoRA will adapt.

    Raises:
        ValueError: no module has such a name; they are quantized, or overlap with each other or with what LoRA adapts.
    """
    copied = saved_modules(model, config)
    of_peft = SEQ_CLS_HEAD_NAMES if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()  # a model has one of them
    for end in set(config.modules_to_save or ()).difference(of_peft):
        if not any(name.endswith(end) for name in copied):
            raise ValueError(
                f"modules_to_save names {end!r}, and no module of this {type(model).__name__} is called so: leave it "
                "out, or give a name of model.named_modules()."
            )
    refuse_nested_copies(model, copied, adapted)
    for name in copied:
        for path, parameter in model.get_submodule(name).named_parameters(name):
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save names {name}, but {path} is quantized and cannot be trained itself: adapt it by "
                    "target_modules, or load the model with it in full precision (llm_int8_skip_modules)."
                )


def refuse_nested_copies(model: nn.Module, copied: Iterable[str] = (), adapted: Iterable[str] = ()) -> None:
    """Refuse copies within copies, and LoRA within them: PEFT then trains a part that the model does not use.

    Args:
        copied, adapted: names of the modules that PEFT will copy or adapt, beside those that it has.

    Raises:
        ValueError: there are such.
    """
    modules = [*model.named_modules()]
    wrapped = [name for name, module in modules if isinstance(module, ModulesToSaveWrapper)]
    layers = {*adapted, *(name for name, module in modules if isinstance(module, LoraLayer))}
    outer = sorted({*copied, *wrapped})
    if both := layers.intersection(outer):
        raise ValueError(
            f"modules_to_save names {unwrapped(min(both))}, which LoRA adapts too, and PEFT does not train both: leave "
            "one of them out."
        )
    for inner in sorted(layers.union(outer)) if outer else ():
        if whole := next((name for name in outer if inner.startswith(f"{name}.")), None):
            raise ValueError(
                f"modules_to_save has PEFT train a copy of {unwrapped(whole)}, and {unwrapped(inner)} in it is copied "
                "or adapted as well, so that a part would be trained that the model does not use: leave one of them "
                "out."
            )
