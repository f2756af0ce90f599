"""AdamW as one writes it down: what tests and benchmarks compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    updates: int,
    plane_axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and moments after an update, in their dtype; the maths is float32, of float64 float64.

    With a plane axis the second moment of a number is that of |g|^2.
    """
    dtype = parameter.dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    w, g, m, v = (x.to(wide) for x in (parameter, gradient, exp_avg, exp_avg_sq))
    first, second = betas
    square = g * g
    if plane_axis is not None:
        square = square + square.flip(plane_axis)
    m = first * m + (1 - first) * g
    v = second * v + (1 - second) * square
    size = (v / (1 - second**updates)).sqrt() + eps
    w = (1 - lr * weight_decay) * w - lr * (m / (1 - first**updates)) / size
    return w.to(dtype), m.to(dtype), v.to(dtype)
