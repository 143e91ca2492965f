"""Models made without training: an adapter into its base, streaming and verified; an expert into a VLM, how much of it.

verify    the ways to serve an adapter, compared with what was trained
adapter   adapter + full-precision base -> standalone checkpoint
baseline  expert + VLM -> VLM, the rivals of the DRIFT paper
gates     gates on the singular directions of Δ beside a frozen model, and how they are trained
gate      a prior -> the same with each singular direction weighed by such gates
"""

from .adapter import merge_adapter
from .baseline import METHODS, merge_baseline
from .gate import OBJECTIVES, gate_prior
from .gates import Gate, gated
from .verify import ONTO, verification_table

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "ONTO",
    "Gate",
    "gate_prior",
    "gated",
    "merge_adapter",
    "merge_baseline",
    "verification_table",
]
