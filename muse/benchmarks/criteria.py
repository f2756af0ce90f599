"""Comparisons of what was measured with a target; what is missing stays None and never passes."""

from __future__ import annotations

# Norms of the gradients of single parameters.
GRADIENT_RANGE = (1e-6, 1e3)


def ratio(value: float | None, baseline: float | None) -> float | None:
    """value / baseline; None where one is missing or the baseline is 0."""
    return value / baseline if value is not None and baseline else None


def saved(value: float | None, baseline: float | None) -> float | None:
    """The share of the baseline that the value does without."""
    part = ratio(value, baseline)
    return None if part is None else 1 - part


def percent(share: float | None) -> float | None:
    """A share in percent."""
    return None if share is None else 100 * share


def all_of(passes: list[bool | None]) -> bool | None:
    """False as soon as one is, else None as long as one is."""
    return False if False in passes else None if None in passes or not passes else True
