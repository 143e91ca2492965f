"""What gating a prior takes, in place of training: `gate_prior` on the same base."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .cards import CARDS, USABLE, base_config, fits, parts_table, read_settings
from .memory import Memory

# As gate_prior has them by default; an answer to an image comes with the image and its question.
STEPS, ANSWERS = 200, 8
KEPT, SAID, PROMPT = 400, 512, 128  # tokens
TOKENS = SAID + PROMPT  # at a time: what is longer than max_tokens goes through by itself


def gating_summary(recipe: str | Path, changes: dict | None = None) -> dict:
    """The estimate for gating the prior of a recipe. Nothing but the base's config.json is downloaded.

    Raises: as `preflight_summary`.
    """
    settings = read_settings(recipe, changes)
    now = Memory(base_config(settings.base), settings.base).gating(settings, TOKENS)
    tokens = STEPS * ANSWERS * (KEPT + SAID)
    return {
        "base": settings.base,
        "prior_rank": settings.prior_rank,
        "moment": now.moment,
        "parts_gb": {part: size / 1e9 for part, size in now.parts.items()},
        "total_gb": now.bytes / 1e9,
        "cards": [{"gb": card, "usable_gb": USABLE * card, "fits": fits(now, card)} for card in CARDS],
        "tokens": tokens,
        "sequences": tokens / settings.max_tokens,
    }


def gating_table(summary: dict) -> Table:
    """The parts of the estimate, the cards that it fits, and the time in terms of training."""
    cards = [f"{card['gb']}" for card in summary["cards"] if card["fits"]]
    caption = (
        f"at its peak, the {summary['moment']}: {TOKENS} tokens at a time. It fits cards of "
        f"{', '.join(cards) or 'none of the usual sizes'} GB. {STEPS} steps of {ANSWERS} answers of either kind are "
        f"{summary['tokens'] / 1e6:.1f} million tokens: as long as training on {summary['sequences']:.0f} sequences of "
        "this recipe"
    )
    return parts_table(summary, f"gating a prior of {summary['base']}", caption)
