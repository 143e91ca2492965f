"""Models made without training: an adapter into its base, streaming and verified; an expert into a VLM.

verify    the ways to serve an adapter, compared with what was trained
belongs   is this the model that an adapter was trained on?
adapter   adapter + full-precision base -> standalone checkpoint
baseline  expert + VLM -> VLM, the rivals of the DRIFT paper
"""

from .adapter import merge_adapter
from .baseline import METHODS, merge_baseline
from .verify import ONTO, verification_table

__all__ = ["METHODS", "ONTO", "merge_adapter", "merge_baseline", "verification_table"]
