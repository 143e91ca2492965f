"""What the parameters of a model are called in a prior."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..checkpoints import Decoder, canonical_name


def canonical_namer(model: nn.Module) -> Callable[[str], str | None]:
    """Name of a parameter, in any wrapper -> its canonical name; None if it is not the language model's.

    What is no model of transformers has the names that a text LLM would have.
    """
    try:
        return Decoder(model).name
    except ValueError:
        return canonical_name
