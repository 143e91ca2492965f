"""Δ = W_expert − W_vlm: taken from two checkpoints, kept in a file, combined, shared.

svd      truncated SVD with its captured energy
delta    Δ of one weight, measured and decomposed
build    two checkpoints -> prior file, streaming, resumable
combine  sums and truncations of priors
share    model card, upload, the prior as a LoRA adapter
prior    ReasoningPrior: the file format, load, save
report/  a prior in words, tables, figures and as a page
"""

from .build import DEFAULT_MODULES, LEAST_COSINE, build_prior
from .prior import PriorVector, PriorWeight, ReasoningPrior

__all__ = ["DEFAULT_MODULES", "LEAST_COSINE", "PriorVector", "PriorWeight", "ReasoningPrior", "build_prior"]
