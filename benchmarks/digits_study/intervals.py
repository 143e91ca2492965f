"""Means over seeds with 95 % bootstrap intervals: seeds are drawn anew, and within each of them the exams' samples."""

from __future__ import annotations

import numpy as np

DRAWS = 2000


def resampled(answers: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap means [DRAWS] of answers [exams, seeds, samples], or of paired differences of such.

    All exams of a seed go together, since they examine one model; their samples are drawn independently.
    """
    exams, seeds, samples = answers.shape
    rng = np.random.default_rng(seed)
    total = np.zeros(DRAWS)
    models = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)  # how often each seed is drawn [DRAWS, seeds]
    for exam in range(exams):
        for s in range(seeds):
            # Drawing samples is drawing their values; a seed that came twice gets two independent draws.
            values, counts = np.unique(answers[exam, s], return_counts=True)
            total += rng.multinomial(samples * models[:, s], counts / samples) @ values / samples
    return total / (exams * seeds)


def interval(answers: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval, of answers or paired differences [exams, seeds, samples]."""
    low, high = np.quantile(resampled(answers), [0.025, 0.975])
    return float(answers.mean()), float(low), float(high)
