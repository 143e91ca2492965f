"""The language model inside a model: what its weights are called, and which of them are projections.

All of it follows from the modules of the class that transformers builds, with its weights or without. A projection is
every linear layer inside the decoder's layers, whatever it is called and however it is quantized, but for what chooses
(routers, indexers), what is in expert stacks, block-diagonal matrices, and cross-attention.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from .naming import PROJECTIONS, cross_attention_layers, module_kind, unwrapped

_NO_MATRIX = re.compile(r"Router|TopK|GroupedLinear")  # in the name of a class: what chooses, or is block-diagonal
_INSIDE = re.compile(r"\.(?:base_layer|original_module|modules_to_save|lora_\w+)(?:\.|$)")  # of what PEFT has wrapped


class Decoder:
    """What one model calls the weights of its language model.

    Args:
        model: a transformers model, vision-language or text only, on any device; bare, or in PEFT, DDP, FSDP, ….

    Attributes:
        module: the module that holds the layers.
        layers: their list, in which the text LLM may lack some.
        path: where this list is, as `model` names it.
        skipped: indices of the layers that the text LLM lacks (mllama's cross-attention).

    Raises:
        ValueError: the model does not say where its language model is.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        root, *others = [module for module in model.modules() if isinstance(module, PreTrainedModel)] or [None]
        if others and not {*others} <= {*root.modules()}:  # a tower beside a language model, or two of these
            root = None
        found = None if root is None else _find_layers(root)
        if found is None:
            raise ValueError(
                f"{type(root or model).__name__} does not say where its language model is: pass target_modules yourself"
            )
        self.module, self.layers = found
        self.skipped = cross_attention_layers(root.config)
        paths = {id(module): name for name, module in model.named_modules()}
        self.path = paths[id(self.layers)]
        self._plain_path, plain = unwrapped(self.path), unwrapped(paths[id(self.module)])
        self._prefix = f"{plain}." if plain else ""
        self._ends = {}  # path of embedding and head -> their canonical name
        for canonical, getter in (("embed_tokens", "get_input_embeddings"), ("lm_head", "get_output_embeddings")):
            try:
                end = getattr(_speaking(root), getter)()
            except NotImplementedError:  # of a model that has none
                continue
            if id(end) in paths:
                self._ends[unwrapped(paths[id(end)])] = canonical

    def __len__(self) -> int:
        """Number of layers, as the text LLM counts them."""
        return len(self.layers) - len(self.skipped)

    def name(self, parameter: str, skipped: Sequence[int] | None = None) -> str | None:
        """Canonical name of a parameter, which need not be there; None if it would not be the language model's.

        Args:
            parameter: as the model names it, in any wrapper.
            skipped: layers that give None and are not counted; by default those that the text LLM lacks.
        """
        skipped = self.skipped if skipped is None else skipped
        plain = unwrapped(parameter)
        module, _, attribute = plain.rpartition(".")
        if module in self._ends:
            return f"{self._ends[module]}.{attribute}"
        if not plain.startswith(self._prefix):
            return None
        if not plain.startswith(f"{self._plain_path}."):
            return plain.removeprefix(self._prefix)
        index, _, rest = plain.removeprefix(f"{self._plain_path}.").partition(".")
        if not index.isdigit() or int(index) in skipped:
            return None
        return f"layers.{int(index) - sum(layer < int(index) for layer in skipped)}.{rest}"

    @cached_property
    def projections(self) -> dict[str, str]:
        """Name of each module that is a projection, as the model names it -> canonical name of its weight."""
        projections, others = {}, []
        for inside, module in self.layers.named_modules():
            if not inside or _INSIDE.search(inside):  # of what PEFT has wrapped, the wrapper is the module
                continue
            name = f"{self.path}.{inside}"
            if _NO_MATRIX.search(type(module).__name__):
                others.append(name)
            canonical = self.name(f"{name}.weight")
            if canonical and is_linear(module) and module_kind(canonical) in PROJECTIONS:
                if not any(name == other or name.startswith(f"{other}.") for other in others):
                    projections[name] = canonical
        return projections

    @cached_property
    def projection_modules(self) -> dict[str, str]:
        """Canonical name of the weight of each projection -> its module, as the model names it."""
        return {canonical: module for module, canonical in self.projections.items()}

    @cached_property
    def kinds(self) -> dict[str, str | None]:
        """Canonical name of each parameter of a bare model's language model -> the preset that selects it, or None."""
        projections, kinds = {*self.projections.values()}, {}
        for parameter, value in self.model.named_parameters(remove_duplicate=False):
            if canonical := self.name(parameter):
                kind = module_kind(canonical)
                steered = canonical in projections if kind in PROJECTIONS else value.dim() == 1 or kind in ENDS
                kinds[canonical] = kind if steered else None
        return kinds

    def sizes(self) -> Iterator[tuple[str | None, str, int]]:
        """Of each parameter in a bare model's layers: canonical name (None if the text LLM lacks the layer), the name
        that it has when all layers are counted, and its number of elements."""
        for parameter, value in self.model.named_parameters(remove_duplicate=False):
            counted = self.name(parameter, skipped=())
            if counted and counted.startswith("layers."):
                yield self.name(parameter), counted, value.numel()

    def beside(self) -> Iterator[str]:
        """Canonical name of each matrix that a bare model's language model has beside its layers, embedding and head,
        such as Gemma 3n's altup_projections; not of towers, nor of tables, of which a row is looked up."""
        apart = {module for part in self.module.children() if _is_tower(part) for module in part.modules()}
        apart.update(self.layers.modules())
        for path, module in self.model.named_modules():
            if module not in apart and not isinstance(module, nn.Embedding):
                for attribute, value in module.named_parameters(recurse=False):
                    canonical = self.name(f"{path}.{attribute}")
                    if value.dim() == 2 and canonical and module_kind(canonical) is None:
                        yield canonical


ENDS = ("head", "embed")


def _is_tower(module: nn.Module) -> bool:
    """Whether a module beside the layers has layers of its own, as Chameleon's tokenizer of images."""
    return any(isinstance(part, nn.ModuleList) for part in module.modules() if part is not module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with a matrix [out_features, in_features], in whatever form it keeps that."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def shared_weights(model: nn.Module) -> set[str]:
    """Names of the matrices that several modules hold, without PEFT's wrappers; an embedding and its head apart."""
    ends = {id(e.weight) for e in model.modules() if isinstance(e, nn.Embedding)}
    names = defaultdict(list)
    for module, held in model.named_modules():
        for attribute, parameter in held.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in ends:
                names[id(parameter)].append(unwrapped(f"{module}.{attribute}"))
    return {name for several in names.values() if len(several) > 1 for name in several}


def _speaking(root: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that thinks in text; of one that also talks, its thinker."""
    return getattr(root, "thinker", root)


def _find_layers(root: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList] | None:
    """The list of the language model's layers, which is the outermost one, and the module that holds it. There is none
    if several lists of such layers are equally far out, as in HRM, whose H and L modules take turns."""
    try:
        depth = getattr(root.config.get_text_config(decoder=True), "num_hidden_layers", None)
        decoder = _speaking(root).get_decoder()
        while isinstance(decoder, PreTrainedModel) and decoder.get_decoder() is not decoder:  # of an encoder-decoder
            decoder = decoder.get_decoder()
    except (ValueError, NotImplementedError):  # it has several text models, or none
        return None
    modules = () if decoder is None else decoder.named_modules()  # it is None in a Perceiver without a head
    lists = [(name, module) for name, module in modules if isinstance(module, nn.ModuleList) and name]
    if not lists:
        return None
    ranks = [(name.count("."), len(layers) != depth, -len(layers)) for name, layers in lists]
    (name, layers), *rivals = (found for found, rank in zip(lists, ranks, strict=True) if rank == min(ranks))
    if any([*map(type, other)] == [*map(type, layers)] for _, other in rivals):
        return None
    part = decoder.get_submodule(name.partition(".")[0])
    if isinstance(part, PreTrainedModel) and _embeds_beside(root, decoder, part):  # pi0's action expert
        return None
    return decoder.get_submodule(name.rpartition(".")[0]), layers


def _embeds_beside(root: PreTrainedModel, decoder: nn.Module, part: nn.Module) -> bool:
    """Whether the text enters at another place in the decoder than in this part of it."""
    try:
        embedding = _speaking(root).get_input_embeddings()
    except NotImplementedError:
        return False
    return embedding in {*decoder.modules()} - {*part.modules()}
