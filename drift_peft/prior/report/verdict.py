"""Plain words on a prior: how far apart its two models are, whether merging them is likely to hurt, what a rank holds.

The thresholds are a rule of thumb of our own, as `BASIS` tells every reader: the paper (DRIFT, arXiv 2510.15050) has
two pairs that lie close together and two that lie far apart, and nothing in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...checkpoints import PROJECTIONS, module_kind

CLOSE, FAR = 0.97, 0.80  # mean cosine of expert and base: at least, below

# Cosines as read off the curves of figure 2, points as in table 1 of the paper's first version and its project page.
BASIS = (
    f"A rule of thumb: a mean cosine of {CLOSE:.2f} or more counts as close, one below {FAR:.2f} as far apart. The "
    "thresholds are ours, set beside the four pairs of figure 2 of the paper (arXiv 2510.15050), whose layers have "
    "cosines of about 0.98 to 1.00 (LLaVA-NeXT and DART-Math; Idefics2 and MetaMath after two layers of 0.79 and 0.90) "
    "and of about 0.63 to 0.77 (Qwen2-VL and Qwen2-Math; Qwen2.5-VL and DeepSeek-R1-Distill). Merged, the close pairs "
    "gained 0.8 to 2.0 points in five of six scores and lost 5.3 in one; the far pairs changed by −8.2 to +0.6. In "
    "between lies the pair of drift-peft's demo, at 0.96: merging costs it perception. Few pairs prove no rule: "
    "measure yours."
)
MERGING = {
    "close": "Naive merging is likely to work: pairs this close gained from it in most of the paper's scores.",
    "between": "Whether naive merging hurts is open: the paper has no pair at this distance.",
    "far": "Naive merging is likely to hurt: pairs this far apart lost up to 8.2 points by it in the paper.",
    None: "So there is no telling here whether naive merging hurts.",
}
MERGING_COMBINED = (
    "Whether merging their sum hurts is open: each cosine is that of an expert alone, whatever its coefficient is here."
)
TITLES = {"close": "Close", "between": "In between", "far": "Far apart", None: "Not judged"}
TITLES_COMBINED = {"close": "Experts close", "between": "Experts in between", "far": "An expert far apart"}
DISTANCE = {
    "close": "The two models are close",
    "between": "The two models are neither close nor far apart",
    "far": "The two models are far apart",
}
DISTANCE_COMBINED = {
    "close": "All experts are close to the base",
    "between": "At least one expert is neither close to the base nor far from it",
    "far": "At least one expert is far from the base",
}


def verdict(weights: Mapping[str, dict], energy_by_rank: Mapping[int, float], combined: bool = False) -> dict:
    """The verdict on a prior, as numbers and as sentences.

    Args:
        weights: canonical name -> statistics, as in a prior's header. Attention and MLP matrices alone are judged.
        energy_by_rank: rank -> share of ‖Δ‖² that the prior holds at this rank.
        combined: the prior is a sum over several experts, and each cosine the smallest of theirs.

    Returns:
        `level` ("close", "between", "far", or None if there is no such matrix), `mean_cosine`, the thresholds
        `close_from` and `far_below`, and the sentences `title`, `distance`, `merging`, `rank`, `basis`.
    """
    cosines = {name: w["cosine"] for name, w in weights.items() if module_kind(name) in PROJECTIONS}
    if cosines:
        mean = math.fsum(cosines.values()) / len(cosines)
        level = "close" if mean >= CLOSE else "far" if mean < FAR else "between"
        lowest = min(cosines, key=cosines.get)
        words = f"{DISTANCE_COMBINED[level]}: the experts' lowest" if combined else f"{DISTANCE[level]}: their"
        distance = (
            f"{words} cosine is {mean:.3f} on average over {len(cosines)} attention and MLP matrices, and "
            f"{cosines[lowest]:.3f} in the most distant, {lowest.removesuffix('.weight')}."
        )
    else:
        mean, level = None, None
        distance = "How far apart the models are is not known: the prior holds no attention or MLP matrix."
    shares = [f"{energy:.1%} at rank {rank}" for rank, energy in energy_by_rank.items()]
    rank = (
        f"Of the difference, ‖Δ‖², the prior holds {', '.join(shares)}."
        if shares
        else "It holds vectors only, and those whole."
    )
    return {
        "level": level,
        "mean_cosine": mean,
        "close_from": CLOSE,
        "far_below": FAR,
        "title": (TITLES_COMBINED if combined and level else TITLES)[level],
        "distance": distance,
        "merging": MERGING_COMBINED if combined and level else MERGING[level],
        "rank": rank,
        "basis": BASIS,
    }
