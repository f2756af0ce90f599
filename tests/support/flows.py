"""What the tests of both implementations of the flow hold it against."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.symplectic import advance, symplectic_flow
from kernels.symplectic.plain import plain_flow
from support import rounding


def leapfrog(steps: int, dt: float) -> tuple[list[float], list[float]]:
    return [dt / 2, *[dt] * (steps - 1), dt / 2], [*[dt] * steps, 0.0]


def force(q, w1, b1, w2, phi="gelu_integral", confinement=0.0) -> Tensor:
    """A kick of 1 to tokens at rest."""
    kick = symplectic_flow(q, torch.zeros_like(q), w1, b1, w2, [1.0], [0.0], phi=phi, confinement=confinement)
    return kick[1]


def reconstruct(q, p, w1, b1, w2, kicks, drifts, **options) -> tuple[Tensor, Tensor]:
    """The state before all stages from that after them: the stages with the other sign, last one first."""
    kicks, drifts = [0.0, *(-kick for kick in kicks[::-1])], [*(-drift for drift in drifts[::-1]), 0.0]
    return advance(q, p, w1, b1, w2, kicks, drifts, **options)[:2]


def held_flow(*tensors_and_stages, phi="gelu_integral", confinement=0.0, scale=0.0):
    """``plain_flow`` of a state in fixed point; in float64 of one that is not rounded."""

    def held(x):
        return rounding.fixed_point(x, scale) if scale and x.dtype != torch.float64 else x

    return plain_flow(*tensors_and_stages, phi, confinement, held)
