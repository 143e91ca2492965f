"""Will training fit the card? From config.json alone.

dry_run  the activations of a training step, on tensors without memory
memory   what training takes on the GPU, by part
cards    which cards a recipe fits, and what to change where it does not
gating   what gating a prior takes, in place of training
"""

from .cards import cards_table, preflight_summary, preflight_table
from .gating import gating_summary, gating_table
from .memory import Memory, Settings

__all__ = [
    "Memory",
    "Settings",
    "cards_table",
    "gating_summary",
    "gating_table",
    "preflight_summary",
    "preflight_table",
]
