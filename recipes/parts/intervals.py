"""Means and their 95 % intervals, by a bootstrap over units that are drawn for all models together."""

from __future__ import annotations

import numpy as np

RESAMPLES, SEED, CHUNK = 10_000, 0, 250


def resample(values: np.ndarray, seed) -> np.ndarray:
    """Means over units drawn with replacement, of a table [units, columns]: [RESAMPLES, columns]."""
    generator, number = np.random.default_rng(seed), len(values)
    chunks = (generator.integers(number, size=(CHUNK, number)) for _ in range(RESAMPLES // CHUNK))
    return np.concatenate([values[drawn].mean(1) for drawn in chunks])


def interval(values: np.ndarray) -> list[float]:
    """Of the mean of values [units]: the bounds that 2.5 % of the resamples are below, and above."""
    return np.quantile(resample(values[:, None], SEED), [0.025, 0.975]).tolist()
