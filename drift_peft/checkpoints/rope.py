"""How the models rotate queries and keys: what of it differs is in the difference of their weights, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..warn import warn
from .checkpoint import Checkpoint

UNSET = {"rope_type": "default", "partial_rotary_factor": 1.0}  # what a model does where its configuration says nothing
ALIKE = {"mrope": "default"}  # which differ for images alone
NOT_OF_TEXT = ("type", "mrope_section", "mrope_interleaved")  # `type` is the old name of rope_type, which is there too


def warn_of_other_rotations(sources: Mapping[str, Checkpoint]) -> None:
    """Warn where a source rotates queries and keys otherwise than the "base": Δ of q and k then also carries this
    change, which no low rank can tell apart.

    Args:
        sources: role -> checkpoint.
    """
    ours = _rotations(sources["base"].text_config)
    for role, source in sources.items():
        theirs = _rotations(source.text_config)
        if differing := list(dict.fromkeys(_differences(theirs, ours, role))):
            warn(f"{', '.join(differing)}: Δ of q_proj and k_proj carries this too")


def _rotations(config: Any) -> dict[str | None, dict]:
    """Type of layer, or None where all are alike -> its parameters of RoPE."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {kind: values for kind, values in parameters.items() if isinstance(values, dict)}
    rotations = {}
    for kind, values in (nested or {None: parameters}).items():
        settings = {key: value for key, value in values.items() if value is not None}
        settings = {
            **UNSET,
            **settings,
            "rope_type": ALIKE.get(settings.get("rope_type"), settings.get("rope_type", "default")),
        }
        if settings["rope_type"] == "default":  # which does not read the others
            settings = {key: settings[key] for key in ("rope_theta", *UNSET) if key in settings}
        rotations[kind] = {key: value for key, value in settings.items() if key not in NOT_OF_TEXT}
    return rotations


def _differences(theirs: dict, ours: dict, role: str) -> Iterator[str]:
    kinds = dict.fromkeys(kind for model in (ours, theirs) for kind in model if kind is not None)
    for kind in kinds or [None]:
        one, other = (model.get(kind, model.get(None, {})) for model in (theirs, ours))
        for key in dict.fromkeys([*other, *one]):
            if one.get(key) != other.get(key):
                sides = [f"{_words(values.get(key))} in the {who}" for values, who in ((one, role), (other, "base"))]
                yield f"rope {key.removeprefix('rope_').replace('_', ' ')} is {' and '.join(sides)}"


def _words(value: Any) -> str:
    if value is None:
        return "not set"
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else str(value)
