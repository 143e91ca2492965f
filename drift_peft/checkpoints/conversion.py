"""Names and tensors of a file as transformers has them in memory: renamed, split, fused or permuted where it does so.

What transformers does with each key, its own conversion mapping says; here that is asked for a single tensor at a time,
and undone for those that are written back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of a file that become others in memory, such as a fused q, k and v.

    Attributes:
        sources: key in the file -> the pattern of the converter that it matches.
        plain: key in the file -> its name after all renamings.
        target: name in memory of what comes out, or of the first of several.
    """

    sources: dict[str, str]
    plain: dict[str, str]
    target: str
    converter: WeightConverter
    model: PreTrainedModel

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Key in the file -> tensor, as name in memory -> tensor."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources.items():
            converter.add_tensor(self.target, key, pattern, tensors[key])
        return self._run(converter, self.target)

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name in memory -> tensor, as key in the file -> tensor."""
        converter, first = self.converter.reverse_transform(), None
        for name, tensor in tensors.items():
            renamed, pattern = converter.rename_source_key(name)
            first = first or renamed
            converter.add_tensor(first, name, pattern, tensor)
        reverted = self._run(converter, first)
        keys = {_without(self.model, plain): key for key, plain in self.plain.items()}
        return {keys[_without(self.model, name)]: tensor for name, tensor in reverted.items()}

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """What `convert` makes of tensors of these shapes; nothing is read."""
        made = self.convert({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def _run(self, converter: WeightConverter, first: str) -> dict[str, Tensor]:
        converted = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class Layout:
    """Which keys of a file transformers reads into which parameter of a model.

    Args:
        model: the class that loads the file, without weights.
        keys: of the file.

    Attributes:
        names: name in memory -> the keys that hold it. More than one is ambiguous. What a conversion makes has its
            name in memory for a key.
        conversions: name in memory -> the conversion that makes it.
        unread: keys that the model has no parameter for.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]):
        transforms, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._model, self._renamings, self._state = model, renamings, state
        converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.names: dict[str, list[str]] = {}
        self.conversions: dict[str, Conversion] = {}
        self.unread: list[str] = []
        found: dict[str, dict[str, str]] = {}  # first name of what a conversion makes -> its sources
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:  # as transformers does: it was in memory's form already
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
            if name not in state:
                self.unread.append(key)
            elif pattern is None:
                self.names.setdefault(name, []).append(key)
            else:
                found.setdefault(name, {})[key] = pattern
        for target, sources in found.items():
            plain = {key: rename_source_key(key, renamings, [])[0] for key in sources}
            converter = of_pattern[next(iter(sources.values()))]
            conversion = Conversion(sources, plain, target, converter, model)
            # Only patterns tell what a conversion makes beside the first, so one is replaced by another.
            first, *others = conversion.converter.target_patterns
            for name in [target, *(target.replace(first, other) for other in others)]:
                self.names.setdefault(name, []).append(name)
                self.conversions[name] = conversion

    def name(self, other: str) -> str:
        """What this version of transformers calls a parameter that another one has called so."""
        return rename_source_key(other, self._renamings, [], self._model.base_model_prefix, self._state)[0]


def _without(model: PreTrainedModel, name: str) -> str:
    """A name without the prefix of the base model, which a file may have or not."""
    return name.removeprefix(f"{model.base_model_prefix}.")
