"""Intervals of what was measured a few times, by resampling (Efron, "Bootstrap Methods", 1979)."""

from __future__ import annotations

import numpy as np

DRAWS = 10_000
# Of the resampled values, as many are below and above an interval of 95 %.
TAILS = (2.5, 97.5)


def resampled(repeats: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Numbers of the repeats in each draw, int (draws, repeats), drawn with replacement.

    Values that share the repeats, as models share the seeds, are resampled together: by the same numbers.
    """
    return np.random.default_rng(seed).integers(repeats, size=(draws, repeats))


def mean_interval(values: np.ndarray, chosen: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of ``values`` (repeats,); None where there is one value, which has none.

    Args:
        values: one a repeat.
        chosen: of ``resampled``.
    """
    if len(values) < 2:
        return None
    low, high = np.percentile(values[chosen].mean(1), TAILS)
    return float(low), float(high)
