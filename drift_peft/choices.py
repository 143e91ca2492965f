"""What some arguments may be, and their defaults: for the library, and for the command line, which imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_LAYERS = 2000  # of a model; more are a slip of the pen, and to build them would take minutes
MODULES = ("attn", "mlp", "norm", "bias", "head", "embed")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # files of pictures

# build_prior
DEFAULT_MODULES = ("attn", "mlp")
RANK, MAX_RANK = 64, 256

Onto = Literal["base", "dequantized"]  # merge_adapter
Objective = Literal["expert", "frism"]  # gate_prior
SAID_TOKENS, SAID_TOP_K = 512, 32  # of the expert's answers there

# merge_baseline
MERGED_MODULES = ("attn", "mlp", "norm", "bias")


@dataclass(frozen=True)
class Method:
    """The defaults of one: weights of the VLM and the expert, density, layers left alone."""

    weights: tuple[float, float]
    density: float | None = None
    skip_first: int = 0


METHODS = {  # merge/baseline.py says what they do, and where the numbers come from
    "task_arithmetic": Method((0.9, 0.1)),
    "ties": Method((1.6, 0.2), density=0.2),
    "dare_linear": Method((1.6, 0.2), density=0.2),
    "dare_ties": Method((1.6, 0.2), density=0.2),
    "layer_swap": Method((0.9, 0.1), skip_first=6),
}
