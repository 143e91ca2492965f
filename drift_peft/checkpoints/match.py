"""Which weights of two or three checkpoints belong together: what has a counterpart, what has none, and why.

Expected is every weight that the classes which transformers builds of the configurations have in common. One that a
file lacks is an error. What only one of the classes has is named and left alone: experts beside a plain MLP, or
mllama's cross-attention layers, which the text model has none of. Rows of heads and embeddings belong together by
token, never by number.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..arguments import listed
from .checkpoint import Checkpoint
from .naming import EMBEDDING, HEAD, layer_of, layer_order, module_kind, says_tied

# No shape shows how many heads there are. Of an MLP only its weights tell: a mixture of experts may have none of the
# intermediate_size that its configuration gives.
SAME_IN_BOTH = ("hidden_size", "num_attention_heads", "num_key_value_heads")
LISTED = 20  # mismatches that an error spells out


@dataclass(frozen=True)
class Match:
    """Weights that all sources have.

    Attributes:
        keys: canonical name -> role of the source -> its raw key, in layer order.
        without_counterpart: canonical name with `*` for each number -> how many weights of this name are not steered,
            because one of the models has none of this name or no preset names them.
        shares: of these names -> their share of the base's weights in the layers, where it has them.
        rows: [tokens, sources] row of each common token in each source's vocabulary, in the order of the base's rows;
            None without head and embedding.
    """

    keys: dict[str, dict[str, str]]
    without_counterpart: dict[str, int]
    shares: dict[str, float]
    rows: torch.Tensor | None

    def rows_of(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Role -> rows of a head or an embedding that belong together; None for all other weights."""
        if not in_vocabulary(name):
            return None
        present = (self.rows < torch.tensor([len(tensor) for tensor in tensors.values()])).all(dim=1)
        return dict(zip(tensors, self.rows[present].T.contiguous(), strict=True))


def match_weights(
    sources: dict[str, Checkpoint],
    modules: Sequence[str],
    only_layers: Sequence[int] | None = None,
    skip_first: int = 0,
) -> Match:
    """Match the selected weights of the sources, one of which is the "base", by their canonical names.

    Args:
        sources: role -> checkpoint.
        modules: presets out of `choices.MODULES`.
        only_layers, skip_first: layers to take, as the text model counts them; other weights are not restricted.

    Raises:
        ValueError: other dimensions; layers or modules that the base does not have; nothing in common; or one error
            that lists everything that is missing, misshaped or claimed twice; a weight that is not in full precision;
            rows of a head or an embedding are asked for, and a source has no tokenizer.
    """
    base = sources["base"]
    for role, other in sources.items():
        differing = [f"{key} {a} and {b}" for key, a, b in _dimensions(other, base) if a != b]
        if differing:
            raise ValueError(f"{role} {other.source} and base {base.source} differ in {', '.join(differing)}")
    layers = _select_layers(base, only_layers, skip_first)
    _refuse_requests(base, modules)

    expected = {name for source in sources.values() for name, kind in source.decoder.kinds.items() if kind in modules}
    sizes = {name: size for name, _, size in base.decoder.sizes()}
    keys, problems, alone = {}, [], list(_unsteered(base, modules, layers))
    for name in sorted(expected, key=layer_order):
        if layer_of(name) not in {*layers, None}:
            continue
        claims = {role: _claims(source, name) for role, source in sources.items()}
        # Few families have biases, and not all of their files.
        lacks_bias = module_kind(name) == "bias" and not all(claims.values())
        if lacks_bias or any(source.decoder.kinds.get(name) not in modules for source in sources.values()):
            alone.append((_pattern(name), sizes.get(name, 0)))
            continue
        if wrong := _mismatches(name, claims, sources):
            problems += wrong
        else:
            keys[name] = {role: found[0] for role, found in claims.items()}
    models = " and ".join(source.source for source in sources.values())
    if problems:
        message = f"{models} do not match in {len(problems)} places: {listed(problems, LISTED)}"
        for source in sources.values():
            if not any(source.claims.values()):  # as under another wrapper's prefix
                keys = " and ".join(sorted(source.keys)[:2])
                message += f"; no key of {source.source} is one of its class, such as {keys}: save the model unwrapped"
        raise ValueError(message)
    counts = dict(sorted(Counter(pattern for pattern, _ in alone).items()))
    if not keys:
        decoders = " and ".join(type(source.model).__name__ for source in sources.values())
        why = f"; without counterpart: {describe(counts)}" if counts else ""
        raise ValueError(
            f"{models} have no weight of {', '.join(modules)} in common: no projection in the decoder of one "
            f"({decoders}) has one of its name in that of the other{why}"
        )
    for name, claimed in keys.items():
        for role, key in claimed.items():
            if wrong := sources[role].quantization_sign(key):
                raise ValueError(f"{name} {wrong} in the {role} {sources[role].source}: name the full-precision one")
    rows = _common_rows(sources) if any(map(in_vocabulary, keys)) else None
    total = sum(size for *_, size in base.decoder.sizes())
    shares = {of: sum(size for pattern, size in alone if pattern == of) / total for of in counts}
    return Match(keys, counts, shares, rows)


def refuse_exchanged(expert: Checkpoint, base: Checkpoint, force_helps: bool = True) -> None:
    """ValueError if the expert sees images and the base does not.

    Args:
        force_helps: whether the caller would not ask with force=True.
    """
    if expert.sees and not base.sees:
        otherwise = ", or pass force=True (--force) if this is what you want" if force_helps else ""
        raise ValueError(
            f"expert {expert.source} is a vision-language model and base {base.source} a text model: the base is what "
            f"is changed, so change their places{otherwise}"
        )


def in_vocabulary(name: str) -> bool:
    """Whether each row of this weight stands for a token."""
    return name.startswith(("lm_head.", "embed_tokens."))


def describe(without_counterpart: dict[str, int], shares: dict[str, float] | None = None) -> str:
    """`Match.without_counterpart` in words, with shares of a hundredth and more."""
    percentages = {of: f", {share:.0%} of the layers" for of, share in (shares or {}).items() if share >= 0.005}
    return ", ".join(
        f"{pattern} ({count}{percentages.get(pattern, '')})" for pattern, count in without_counterpart.items()
    )


def _dimensions(one: Checkpoint, other: Checkpoint) -> Iterator[tuple]:
    yield "number of layers", len(one.decoder), len(other.decoder)
    # As they are written: where layers differ, reading the attribute of a whole model is an error.
    ours, theirs = one.text_config.to_dict(), other.text_config.to_dict()
    for key in SAME_IN_BOTH:
        if None not in (values := (ours.get(key), theirs.get(key))):
            yield key, *values


def _select_layers(base: Checkpoint, only: Sequence[int] | None, skip_first: int) -> set[int]:
    depth = len(base.decoder)
    if (outside := next((layer for layer in only or () if not 0 <= layer < depth), None)) is not None:
        raise ValueError(f"only_layers names layer {outside}, but {base.source} has the layers 0 to {depth - 1}")
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
        if module in modules and module not in base.decoder.kinds.values():
            raise ValueError(f"modules={module!r}: the language model of {base.source} has none")


def _unsteered(base: Checkpoint, modules: Sequence[str], layers: set[int]) -> Iterator[tuple[str, int]]:
    """Patterns and sizes of the base's weights that no preset names (routers, experts), or in layers that the text LLM
    lacks, or beside the layers."""
    kinds = base.decoder.kinds
    for name, counted, size in base.decoder.sizes():
        beside = name is None and module_kind(counted) in (*modules, None)
        if beside or (name and layer_of(name) in layers and kinds[name] is None):
            yield _pattern(counted if beside else name), size
    for name in base.decoder.beside():
        yield _pattern(name), 0  # it has no share of the layers


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _is_tied(source: Checkpoint) -> bool:
    """Whether the embedding is the head: there is no other on disk. The configuration alone cannot be trusted."""
    return HEAD not in source.claims and says_tied(source.config)


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
