"""Models made without training: an adapter into its base, streaming and verified; an expert into a VLM, how much of it.

verify      the ways to serve an adapter, compared with what was trained
belongs     is this the model that an adapter was trained on?
adapter     adapter + full-precision base -> standalone checkpoint
baseline    expert + VLM -> VLM, the rivals of the DRIFT paper
card        what a merged model was merged of, the call that did it, and how it is loaded
same        is an existing folder what a merge would make?
cost        how far a part of Δ takes the VLM from its own answers
transplant  text fine-tune or LoRA adapter -> adapter of the VLM, or VLM
gates       gates on the singular directions of Δ beside a frozen model, and how they are trained
gate        a prior -> the same with each singular direction weighed by such gates
"""

from .adapter import merge_adapter
from .baseline import merge_baseline
from .belongs import refuse_other_base
from .cost import cost_table
from .gate import gate_prior
from .gates import Gate, gated
from .transplant import transplant
from .verify import check_memory, verification_table

__all__ = [
    "Gate",
    "check_memory",
    "cost_table",
    "gate_prior",
    "gated",
    "merge_adapter",
    "merge_baseline",
    "refuse_other_base",
    "transplant",
    "verification_table",
]
