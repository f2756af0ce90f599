"""Operands whose strides tell them apart, with NaN wherever nothing may be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def padded(x: Tensor, *gaps: int) -> Tensor:
    """The same values, each axis of their memory longer by its gap of NaN."""
    room = torch.full([n + gap for n, gap in zip(x.shape, gaps, strict=True)], math.nan).to(x)
    return room[tuple(map(slice, x.shape))].copy_(x)
