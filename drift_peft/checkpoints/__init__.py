"""Model folders and adapters as they lie on disk or on the hub: what is in them, what belongs together, safe writing.

Nothing here knows of priors or of training.

    schema       JSON that others write: its form
    naming       one canonical name per language-model weight
    hub          model repositories: resolved to a commit, fetched file by file, freed again
    headed       a safetensors file of ours with its header, read and written
    sharing      such a file that others have or will have: found, uploaded with its card
    serving      how an adapter is loaded, merged and served, as the cards tell it
    shards       one file of weights: safetensors, .bin; 4-bit weights as matrices
    tokenizer    the files of tokenizer and chat templates, which go together
    checkpoint   lazy tensors of a local folder or hub repository, one open shard at a time
    decoder      the language model inside a model: names of its weights, and which are projections
    peft_names   how PEFT rewrites names for transformers 5
    versions     what older versions of PEFT do wrong, refused by name
    targets      PEFT's target_modules for exactly these
    conversion   a file's names and tensors as transformers has them in memory
    match        which weights of two checkpoints belong together
    rope         how models rotate queries and keys, and a warning where that differs
    update       what an adapter makes of one tensor
    promised     does an adapter's file hold all that its config promises?
    adapter      the files of a LoRA adapter: its config, and what each of its tensors does
    lora         what a LoRA adapter makes of which tensor of a checkpoint; an expert given as adapter + base
    vllm         a LoRA adapter as vLLM serves it, or why it cannot
    carry        a LoRA adapter of the text sibling as one of the VLM
    dequantized  the base as a 4-bit model computes with it
    lock         one writer at a time
    watch        files that are read for minutes: are they still what they were?
    output       where a result is written until it is complete, and what an interrupted one leaves
    standalone   a copy of a model folder in which named weights are replaced, streaming
"""

from .adapter import PLAIN_STARTS, lora_variants, read_updates
from .carry import carry_adapter, scale_adapter
from .checkpoint import Checkpoint, read_config, refuse_quantized, skeleton
from .decoder import Decoder, shared_weights
from .dequantized import (
    DequantizedCheckpoint,
    Quantization,
    assumed_quantization,
    quantization_in_training,
    quantization_of,
)
from .headed import HeadedFile, write_headed
from .hub import at_revision, cached_snapshot, folder_of, split_revision
from .lock import only_writer
from .lora import (
    DRIFT_CONFIG,
    adapter_folder,
    adapter_updates,
    is_adapter,
    open_expert,
    recorded_base,
    watched_adapter,
    write_adapter,
)
from .match import Match, describe, match_weights, refuse_exchanged
from .naming import (
    EMBEDDING,
    HEAD,
    PROJECTIONS,
    canonical_name,
    cross_attention_layers,
    layer_of,
    layer_order,
    module_kind,
    pattern_matches,
    sampled,
    says_tied,
    unwrapped,
)
from .output import (
    claimed_output,
    finish,
    finished,
    gathered,
    partial_folder,
    partial_path,
    refuse_both,
    refuse_other,
    resumable_folder,
    write_output,
    write_tensors,
)
from .peft_names import convert_peft_config_for_transformers
from .rope import warn_of_other_rotations
from .schema import Origin, Schema, Text, check, read_json
from .serving import TASK, auto_class_of, how_to_load, how_to_serve
from .sharing import (
    SharedFile,
    find_license,
    hub_id,
    in_markdown,
    is_pinned,
    is_same_origin,
    license_name,
    named,
    pinned,
    place_of,
    repository_of,
    shown,
    state_licences,
    with_full_path,
)
from .standalone import one_thread, refuse_other_files, replaced_when_complete, write_model
from .targets import as_peft_reads, language_model_targets, past_adapters
from .tokenizer import TEMPLATES, TEMPLATES_INSIDE, TOKENIZER, chat_templates, has_tokenizer, take_tokenizer
from .update import LowRank, Rows, Update, Whole, block_rows
from .versions import needs_peft
from .vllm import export_for_vllm
from .watch import Watch

__all__ = [
    "DRIFT_CONFIG",
    "EMBEDDING",
    "HEAD",
    "PLAIN_STARTS",
    "PROJECTIONS",
    "TASK",
    "TEMPLATES",
    "TEMPLATES_INSIDE",
    "TOKENIZER",
    "Checkpoint",
    "Decoder",
    "DequantizedCheckpoint",
    "HeadedFile",
    "LowRank",
    "Match",
    "Origin",
    "Quantization",
    "Rows",
    "Schema",
    "SharedFile",
    "Text",
    "Update",
    "Watch",
    "Whole",
    "adapter_folder",
    "adapter_updates",
    "as_peft_reads",
    "assumed_quantization",
    "at_revision",
    "auto_class_of",
    "block_rows",
    "cached_snapshot",
    "canonical_name",
    "carry_adapter",
    "chat_templates",
    "check",
    "claimed_output",
    "convert_peft_config_for_transformers",
    "cross_attention_layers",
    "describe",
    "export_for_vllm",
    "find_license",
    "finish",
    "finished",
    "folder_of",
    "gathered",
    "has_tokenizer",
    "how_to_load",
    "how_to_serve",
    "hub_id",
    "in_markdown",
    "is_adapter",
    "is_pinned",
    "is_same_origin",
    "language_model_targets",
    "layer_of",
    "layer_order",
    "license_name",
    "lora_variants",
    "match_weights",
    "module_kind",
    "named",
    "needs_peft",
    "one_thread",
    "only_writer",
    "open_expert",
    "partial_folder",
    "partial_path",
    "past_adapters",
    "pattern_matches",
    "pinned",
    "place_of",
    "quantization_in_training",
    "quantization_of",
    "read_config",
    "read_json",
    "read_updates",
    "recorded_base",
    "refuse_both",
    "refuse_exchanged",
    "refuse_other",
    "refuse_other_files",
    "refuse_quantized",
    "replaced_when_complete",
    "repository_of",
    "resumable_folder",
    "sampled",
    "says_tied",
    "scale_adapter",
    "shared_weights",
    "shown",
    "skeleton",
    "split_revision",
    "state_licences",
    "take_tokenizer",
    "unwrapped",
    "warn_of_other_rotations",
    "watched_adapter",
    "with_full_path",
    "write_adapter",
    "write_headed",
    "write_model",
    "write_output",
    "write_tensors",
]
