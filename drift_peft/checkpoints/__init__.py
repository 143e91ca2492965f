"""Model folders and adapters as they lie on disk or on the hub: what is in them, what belongs together, safe writing.

Nothing here knows of priors or of training.

    naming       one canonical name per language-model weight; exact PEFT targets
    hub          model repositories: resolved to a commit, fetched file by file, freed again
    shards       one file of weights: safetensors, .bin; 4-bit weights as matrices
    checkpoint   lazy tensors of a local folder or hub repository, one open shard at a time
    match        which weights of two checkpoints belong together
    update       what an adapter makes of one tensor
    lora         LoRA adapters read without a model; an expert given as adapter + base
    dequantized  the base as a 4-bit model computes with it
    output       where a result is written until it is complete, and what an interrupted one leaves
    standalone   a copy of a model folder in which named weights are replaced, streaming
"""

from .checkpoint import TOKENIZER, Checkpoint
from .dequantized import (
    DequantizedCheckpoint,
    Quantization,
    assumed_quantization,
    quantization_in_training,
    quantization_of,
)
from .hub import download, split_revision
from .lora import DRIFT_CONFIG, adapter_folder, adapter_updates, in_memory_names, open_expert
from .match import MODULES, Match, describe, match_weights
from .naming import (
    PROJECTION,
    canonical_name,
    cross_attention_layers,
    language_model_targets,
    layer_order,
    module_kind,
)
from .output import UNFINISHED, partial_folder, partial_path, refuse_output, resumable_folder, write_tensors
from .standalone import replaced_when_complete, write_model
from .update import LowRank, Rows, Update, block_rows

__all__ = [
    "DRIFT_CONFIG",
    "MODULES",
    "PROJECTION",
    "TOKENIZER",
    "UNFINISHED",
    "Checkpoint",
    "DequantizedCheckpoint",
    "LowRank",
    "Match",
    "Quantization",
    "Rows",
    "Update",
    "adapter_folder",
    "adapter_updates",
    "assumed_quantization",
    "block_rows",
    "canonical_name",
    "cross_attention_layers",
    "describe",
    "download",
    "in_memory_names",
    "language_model_targets",
    "layer_order",
    "match_weights",
    "module_kind",
    "open_expert",
    "partial_folder",
    "partial_path",
    "quantization_in_training",
    "quantization_of",
    "refuse_output",
    "replaced_when_complete",
    "resumable_folder",
    "split_revision",
    "write_model",
    "write_tensors",
]
