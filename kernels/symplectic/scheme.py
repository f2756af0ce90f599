"""What both implementations of a flow are given: its potential, its stages and its fixed-point state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The potentials by name, in the order of the kernels' constant PHI.
POTENTIALS = ("gelu_integral", "silu", "gelu", "softplus")
# An int32 holds whole numbers of smaller size than this.
LIMIT = 2.0**31


class Weights(NamedTuple):
    """The parameters of the potential."""

    w1: Tensor  # (hidden, D)
    b1: Tensor  # (hidden,), or (tokens, hidden) for one of each token
    w2: Tensor  # (hidden,)
    phi: str
    confinement: float  # c, stiffness of the spring

    @property
    def biased_by_token(self) -> bool:
        """Whether every token has a b1 of its own."""
        return self.b1.dim() > 1


class Scheme(NamedTuple):
    """The stages, and the unit of the state."""

    kicks: Sequence[float]
    drifts: Sequence[float]
    scale: float

    @property
    def unit(self) -> float:
        """By how much a state exceeds its value."""
        return self.scale or 1.0


def reversed_scheme(scheme: Scheme) -> Scheme:
    """The stages that undo stages: every half with the other sign, last one first."""
    kicks = (0.0, *(-kick for kick in reversed(scheme.kicks)))
    drifts = (*(-drift for drift in reversed(scheme.drifts)), 0.0)
    return Scheme(kicks, drifts, scheme.scale)


def first_kick(scheme: Scheme) -> int:
    """The stage of the first kick: gradients ask for no state before it. All stages where none kicks."""
    return next((stage for stage, kick in enumerate(scheme.kicks) if kick), len(scheme.kicks))


def copied(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


def to_fixed_point(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rint(scale x) as int32, 0 where that does not fit, and the largest size, infinite if one does not."""
    whole = (x * scale).round_()
    size = whole.abs()
    fits = size < LIMIT
    size.masked_fill_(~fits, math.inf)
    return whole.masked_fill_(~fits, 0).to(torch.int32), size.amax() if x.numel() else size.sum()
