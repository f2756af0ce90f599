"""Learning-rate schedules, and what becomes of one whose options change on the way."""

from __future__ import annotations

import math

from muse.config import OptimConfig


def learning_rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Fraction of the peak learning rate in step ``step`` (from 0) of ``steps``.

    ``cosine`` (Loshchilov and Hutter 2017) and ``wsd`` (warm-up, stable, decay; Hu et al. 2024) end at
    ``final_lr``; ``constant`` stays at 1. All warm up linearly, for at most half of the run.
    """
    warmup = min(config.warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(config.decay * steps))
    left = (steps - 1 - step) / decay_steps
    return 1.0 if left >= 1 else config.final_lr + (1 - config.final_lr) * max(0.0, left)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate in step ``step`` (from 0) of ``steps``: AdamW's, or Muon's where it is the optimiser."""
    peak = config.muon_lr if config.name == "muon" else config.lr
    return peak * learning_rate_factor(config, step, steps)


def same_until(step: int, first: OptimConfig, steps: int, second: OptimConfig, other_steps: int) -> bool:
    """Whether two schedules, of ``steps`` and of ``other_steps``, have the same rates before ``step``."""
    if step and (first.lr, first.muon_lr) != (second.lr, second.muon_lr):
        return False
    return all(
        learning_rate_factor(first, n, steps) == learning_rate_factor(second, n, other_steps)
        for n in range(step)
    )
