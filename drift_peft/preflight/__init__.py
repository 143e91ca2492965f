"""Will training fit the card? From config.json alone.

dry_run  the activations of a training step, on tensors without memory
memory   what training takes on the GPU, by part
cards    which cards a recipe fits, and what to change where it does not
"""

from .cards import cards_table, keeping_sentence, preflight_summary, preflight_table
from .memory import Memory, Settings

__all__ = ["Memory", "Settings", "cards_table", "keeping_sentence", "preflight_summary", "preflight_table"]
