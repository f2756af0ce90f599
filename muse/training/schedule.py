"""Learning-rate schedules."""

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
