"""Δ = W_expert − W_vlm: taken from two checkpoints, kept in a file, combined, shared.

header   the form of its header
file     the file of a prior, read and written
svd      truncated SVD with its captured energy
delta    Δ of one weight, measured and decomposed
combine  sums and truncations of priors
share    model card, the prior as a LoRA adapter
prior    ReasoningPrior: the file with all that can be done with it
same     is an existing prior what a build would make?
merged   a base that has taken a part of Δ in, and what is left of it then
reading  the weights of all models, one read ahead
build    two checkpoints -> prior file, streaming, resumable
report/  a prior in words, tables, figures and as a page
"""

from .build import build_prior
from .delta import fingerprint_of, refuse_unrelated
from .file import FINGERPRINT_TOLERANCE, ROUNDING_TOLERANCE, PriorVector, PriorWeight
from .merged import HOW_KEY, MergedDelta, forget_merge, read_merge
from .prior import ReasoningPrior, write_gated
from .share import origins_of

__all__ = [
    "FINGERPRINT_TOLERANCE",
    "HOW_KEY",
    "ROUNDING_TOLERANCE",
    "MergedDelta",
    "PriorVector",
    "PriorWeight",
    "ReasoningPrior",
    "build_prior",
    "fingerprint_of",
    "forget_merge",
    "origins_of",
    "read_merge",
    "refuse_unrelated",
    "write_gated",
]
