"""What it is worth to apply the same weights several times, in weights that are applied once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Exponents that are tried. One at an end of them was not found.
EXPONENTS = np.arange(-1.0, 2.0 + 1e-9, 0.005)


@dataclass(frozen=True)
class Recurrence:
    """A model of which some weights are applied several times.

    Attributes:
        once: numbers in weights that are applied once.
        repeated: numbers in those that are applied ``times`` times.
        times: r; 1 for a model without recurrence.
    """

    once: int
    repeated: int
    times: int


def recurrence_exponents(models: Sequence[Recurrence], losses: np.ndarray) -> np.ndarray:
    """The exponent phi with which r applications of N weights are worth r^phi N weights applied once.

    Of the law L = E + A (N_once + r^phi N_repeated)^-alpha + B D^-beta of "How Much Is One Recurrence Worth?"
    (2026, arXiv 2604.21106), for one amount of data D and sizes so near each other that the loss is linear in
    the logarithm of the effective weights: of the phi in [-1, 2], the one with the least squares.

    Args:
        models: of one family, some of other sizes without recurrence, which say what weights are worth.
        losses: (draws, models).

    Returns:
        (draws,); NaN where models without recurrence have one size, more weights do not lower the loss, or
        the best exponent is at an end of those tried.
    """
    found = np.full(len(losses), np.nan)
    if len({model.once + model.repeated for model in models if model.times == 1}) < 2:
        return found
    once, repeated, times = (
        np.array([getattr(model, name) for model in models], float) for name in ("once", "repeated", "times")
    )
    sizes = np.log(once + times ** EXPONENTS[:, None] * repeated)
    sizes -= sizes.mean(1, keepdims=True)
    centred = losses - losses.mean(1, keepdims=True)
    # (exponents, draws).
    products = sizes @ centred.T
    explained = products**2 / (sizes**2).sum(1, keepdims=True)
    best = explained.argmax(0)
    falls = products[best, np.arange(len(losses))] < 0
    inside = (best > 0) & (best < len(EXPONENTS) - 1)
    found[falls & inside] = EXPONENTS[best][falls & inside]
    return found
