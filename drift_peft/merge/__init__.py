"""Models made without training: an adapter into its base, streaming and verified; an expert into a VLM.

verify      the ways to serve an adapter, compared with what was trained
belongs     is this the model that an adapter was trained on?
adapter     adapter + full-precision base -> standalone checkpoint
baseline    expert + VLM -> VLM, the rivals of the DRIFT paper
same        is an existing folder what a merge would make?
cost        how far a part of Δ takes the VLM from its own answers
transplant  text fine-tune or LoRA adapter -> adapter of the VLM, or VLM
"""

from .adapter import merge_adapter
from .baseline import METHODS, merge_baseline
from .cost import cost_table
from .transplant import transplant
from .verify import ONTO, check_memory, verification_table

__all__ = [
    "METHODS",
    "ONTO",
    "check_memory",
    "cost_table",
    "merge_adapter",
    "merge_baseline",
    "transplant",
    "verification_table",
]
