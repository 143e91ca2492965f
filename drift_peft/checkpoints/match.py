"""Which weights of two or three checkpoints belong together: what has a counterpart, what has none, and why.

Expected is every weight that a configuration calls for or a checkpoint holds. One that a source lacks is an error,
unless that source's configuration explains it: linear attention has no q_proj, a mixture of experts no plain MLP, and
the text model none of mllama's cross-attention layers. Rows of heads and embeddings belong together by token, never by
number.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint
from .naming import canonical_name, cross_attention_layers, layer_order, module_kind

MODULES = ("attn", "mlp", "norm", "bias", "head", "embed")
SAME_IN_BOTH = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of configurations
LISTED = 20  # mismatches that an error spells out


@dataclass(frozen=True)
class Match:
    """Weights that all sources have.

    Attributes:
        keys: canonical name -> role of the source -> its raw key, in layer order.
        without_counterpart: canonical name with `*` for each number -> how many weights of this name are not steered,
            because a source rightly lacks them or no preset names them.
        rows: [tokens, sources] row of each common token in each source's vocabulary, in the order of the base's rows;
            None without head and embedding.
    """

    keys: dict[str, dict[str, str]]
    without_counterpart: dict[str, int]
    rows: torch.Tensor | None

    def rows_of(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Role -> rows of a head or an embedding that belong together; None for all other weights."""
        if not in_vocabulary(name):
            return None
        there = (self.rows < torch.tensor([len(tensor) for tensor in tensors.values()])).all(dim=1)
        return dict(zip(tensors, self.rows[there].T.contiguous(), strict=True))


def match_weights(
    sources: dict[str, Checkpoint],
    modules: Sequence[str],
    only_layers: Sequence[int] | None = None,
    skip_first: int = 0,
) -> Match:
    """Match the selected weights of the sources, one of which is the "base", by their canonical names.

    Args:
        sources: role -> checkpoint.
        modules: presets out of `MODULES`.
        only_layers, skip_first: layers to take, as the text model counts them; other weights are not restricted.

    Raises:
        ValueError: other dimensions; layers or modules that the base does not have; nothing in common; or one error
            that lists everything that is missing, misshaped or claimed twice; rows of a head or an embedding are asked
            for, and a source has no tokenizer.
    """
    base = sources["base"]
    for role, other in sources.items():
        differing = [f"{key} {a} and {b}" for key, a, b in _dimensions(other, base) if a != b]
        if differing:
            raise ValueError(f"{role} {other.source} and base {base.source} differ in {', '.join(differing)}")
    layers = _select_layers(base, only_layers, skip_first)
    _refuse_requests(base, modules)

    absences = {role: _Absences(source) for role, source in sources.items()}
    expected = {HEAD, EMBEDDING}.union(*(source.claims for source in sources.values()))
    expected |= {name for name in _projections(base) if not all(absent.explain(name) for absent in absences.values())}
    keys, alone, problems = {}, Counter(_unsteered(base, modules, layers)), []
    for name in sorted(expected, key=layer_order):
        if module_kind(name) not in modules or _layer(name) not in {*layers, None}:
            continue
        claims = {role: _claims(source, name) for role, source in sources.items()}
        lacking = [role for role, found in claims.items() if not found]
        if lacking and all(absences[role].explain(name) for role in lacking):
            alone[_pattern(name)] += 1
        elif wrong := _mismatches(name, claims, sources):
            problems += wrong
        else:
            keys[name] = {role: found[0] for role, found in claims.items()}
    models = " and ".join(source.source for source in sources.values())
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"{models} do not match in {len(problems)} places: {'; '.join(problems[:LISTED])}{more}")
    if not keys:
        why = f"; without counterpart: {describe(alone)}" if alone else ""
        raise ValueError(f"{models} have no weight of {', '.join(modules)} in common{why}")
    return Match(keys, dict(sorted(alone.items())), _common_rows(sources) if any(map(in_vocabulary, keys)) else None)


def in_vocabulary(name: str) -> bool:
    """Whether each row of this weight stands for a token."""
    return name.startswith(("lm_head.", "embed_tokens."))


def describe(without_counterpart: dict[str, int]) -> str:
    """`Match.without_counterpart` in words."""
    return ", ".join(f"{pattern} ({count})" for pattern, count in without_counterpart.items())


def _depth(config) -> int:
    return config.num_hidden_layers - len(cross_attention_layers(config))


def _dimensions(one: Checkpoint, other: Checkpoint) -> Iterator[tuple]:
    yield "number of layers", _depth(one.text_config), _depth(other.text_config)
    for key in SAME_IN_BOTH:
        values = getattr(one.text_config, key, None), getattr(other.text_config, key, None)
        if None not in values:
            yield key, *values


def _select_layers(base: Checkpoint, only: Sequence[int] | None, skip_first: int) -> set[int]:
    depth = _depth(base.text_config)
    if outside := [layer for layer in only or () if not 0 <= layer < depth]:
        raise ValueError(f"only_layers names layer {outside[0]}, but {base.source} has the layers 0 to {depth - 1}")
    if skip_first >= depth:
        raise ValueError(f"skip_first={skip_first} leaves none of the {depth} layers of {base.source}")
    layers = {layer for layer in (range(depth) if only is None else only) if layer >= skip_first}
    if not layers:
        raise ValueError(f"only_layers={list(only)} and skip_first={skip_first} leave no layer")
    return layers


def _refuse_requests(base: Checkpoint, modules: Sequence[str]) -> None:
    """What was asked for by name and is not there. Attention and MLP are the default: experts may stand for them."""
    if "head" in modules and _is_tied(base):
        raise ValueError(f"the head of {base.source} is its embedding: ask for embed instead of head")
    for module in ("norm", "bias"):
        if module in modules and not any(module_kind(name) == module for name in base.claims):
            raise ValueError(f"modules={module!r}: the language model of {base.source} has none")


class _Absences:
    """Which weights a source rightly lacks: attention in its linear layers, a plain MLP beside its experts."""

    def __init__(self, source: Checkpoint):
        config = source.text_config
        kinds = getattr(config, "layer_types", None) or []
        # "conv" and "mamba" are no attention; "full_attention", "sliding_attention" and "hybrid" are.
        self.linear = {i for i, k in enumerate(kinds) if not re.search("attention|hybrid", k) or "linear" in k}
        experts = any(getattr(config, key, None) for key in EXPERTS)
        # Which layers these are, each family's configuration says in its own way, and the names in one.
        self.sparse = {_layer(name) for name in source.claims if experts and ".experts." in name}

    def explain(self, name: str) -> bool:
        block = name.split(".")[2] if name.startswith("layers.") else None
        if module_kind(name) == "bias":  # few families have them
            return True
        if block in ("self_attn", "linear_attn"):
            return (_layer(name) in self.linear) == (block == "self_attn")
        return block == "mlp" and _layer(name) in self.sparse


def _projections(source: Checkpoint) -> Iterator[str]:
    for layer in range(_depth(source.text_config)):
        yield from (f"layers.{layer}.self_attn.{p}_proj.weight" for p in "qkvo")
        yield from (f"layers.{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))


def _unsteered(base: Checkpoint, modules: Sequence[str], layers: set[int]) -> Iterator[str]:
    """Patterns of the base's weights that no preset names (experts, linear attention) or in cross-attention layers."""
    for name in base.claims:
        if _layer(name) in layers and module_kind(name) is None and "rotary_emb" not in name:  # an old buffer
            yield _pattern(name)
    cross = cross_attention_layers(base.config)
    for name in filter(None, map(canonical_name, base.keys)):
        if _layer(name) in cross and module_kind(name) in (*modules, None):
            yield _pattern(name)


def _layer(name: str) -> int | None:
    return layer_order(name)[1] if name.startswith("layers.") else None


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _is_tied(source: Checkpoint) -> bool:
    """Whether the embedding is the head: there is no other on disk. The configuration alone cannot be trusted."""
    configs = source.config, source.text_config
    return HEAD not in source.claims and any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _claims(source: Checkpoint, name: str) -> list[str]:
    return source.claims.get(EMBEDDING if name == HEAD and _is_tied(source) else name, [])


def _mismatches(name: str, claims: dict[str, list[str]], sources: dict[str, Checkpoint]) -> list[str]:
    problems, shapes = [], {}
    for role, keys in claims.items():
        if len(keys) == 1:
            shapes[role] = sources[role].shape(keys[0])
        else:
            problems.append(f"{name} {'claimed by ' + ' and '.join(keys) if keys else 'missing'} in the {role}")
    first = 1 if in_vocabulary(name) else 0  # vocabularies may differ in size
    dimensions = 1 if module_kind(name) in ("norm", "bias") else 2
    if len({shape[first:] for shape in shapes.values()}) > 1 or any(len(s) != dimensions for s in shapes.values()):
        problems.append(f"{name} is {', '.join(f'{list(shape)} in the {role}' for role, shape in shapes.items())}")
    return problems


def _common_rows(sources: dict[str, Checkpoint]) -> torch.Tensor:
    vocabularies = {role: source.vocabulary() for role, source in sources.items()}
    tokens = [token for token in vocabularies["base"] if all(token in v for v in vocabularies.values())]
    if not tokens:
        raise ValueError(
            f"the tokenizers of {' and '.join(s.source for s in sources.values())} have no token in common"
        )
    rows = torch.tensor([[vocabulary[token] for vocabulary in vocabularies.values()] for token in tokens])
    return rows[rows[:, list(vocabularies).index("base")].argsort()]
