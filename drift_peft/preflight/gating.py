"""What gating a prior takes, in place of training: `gate_prior` on the same base."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ..choices import SAID_TOKENS
from .cards import CARDS, parts_table, read_base, read_settings, verdict

# As gate_prior has them by default; an answer to an image comes with the image and its question.
STEPS, ANSWERS = 200, 8
KEPT, SAID, PROMPT = 400, SAID_TOKENS, 128  # tokens
TOKENS = SAID + PROMPT  # at a time: what is longer than max_tokens goes through by itself


def gating_summary(recipe: str | Path, changes: dict | None = None) -> dict:
    """The estimate for gating the prior of a recipe. Downloaded is what `preflight_summary` downloads.

    Raises: as `preflight_summary`.
    """
    memory, settings = read_base(read_settings(recipe, changes))
    now = memory.gating(settings, TOKENS)
    tokens = STEPS * ANSWERS * (KEPT + SAID)
    return {
        "base": settings.base,
        "prior_rank": settings.prior_rank,
        **now.summary(),
        "cards": [verdict(now, card) for card in CARDS],
        "tokens": tokens,
        "sequences": tokens / settings.max_tokens,
    }


def gating_table(summary: dict) -> Table:
    """The parts of the estimate, the cards that it fits, and the time in terms of training."""
    cards = ", ".join(f"{card['gb']} GB" for card in summary["cards"] if card["fits"])
    fit = f"cards of {cards}" if cards else "none of the usual cards"
    caption = (
        f"at its peak, the {summary['moment']}: {TOKENS} tokens at a time. It fits {fit}. {STEPS} steps of {ANSWERS} "
        f"answers of either kind are {summary['tokens'] / 1e6:.1f} million tokens: as long as training on "
        f"{summary['sequences']:.0f} sequences of this recipe"
    )
    return parts_table(summary, f"gating a prior of {summary['base']}", caption)
