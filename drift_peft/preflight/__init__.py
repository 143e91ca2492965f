"""Will training fit the card? From config.json, and the configuration of the processor, alone.

dry_run          the activations of a training step, on tensors without memory
recipe_settings  the keys of a recipe that are a run's own, and what recipes/sft_vlm.py refuses before it reads a model
images           into how many patches and tokens a processor cuts images, and what their pixels take
processor        what the base's own processor says of images
loading          what model_init_kwargs changes of it
memory           what training takes on the GPU, by part
cards            which cards a recipe fits, and what to change where it does not
gating           what gating a prior takes, in place of training
"""

from .cards import base_config, cards_table, keeping_sentence, preflight_summary, preflight_table
from .gating import gating_summary, gating_table
from .memory import Memory, Settings
from .recipe_settings import (
    DRIFT,
    LORA,
    STEP,
    DriftArguments,
    RunArguments,
    adapter_of,
    check_together,
    refuse_what_cannot_work,
    value_of,
)

__all__ = [
    "DRIFT",
    "LORA",
    "STEP",
    "DriftArguments",
    "Memory",
    "RunArguments",
    "Settings",
    "adapter_of",
    "base_config",
    "cards_table",
    "check_together",
    "gating_summary",
    "gating_table",
    "keeping_sentence",
    "preflight_summary",
    "preflight_table",
    "refuse_what_cannot_work",
    "value_of",
]
