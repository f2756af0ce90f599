"""Initialisation of complex weights.

Rayleigh moduli with uniform phases are from Trabelsi et al., "Deep Complex Networks", ICLR 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rayleigh_scale(fan_in: int, fan_out: int, kind: str) -> float:
    """Rayleigh parameter s, E|w|^2 = 2 s^2: Glorot 1/sqrt(fan_in + fan_out), He 1/sqrt(fan_in)."""
    return 1 / math.sqrt(fan_in + fan_out if kind == "glorot" else fan_in)


def modulus_median(scale: float, fan_in: int) -> float:
    """Median of |W z| for Rayleigh(scale) weights and E|z|^2 = 1: it is Rayleigh(scale sqrt(fan_in))."""
    return scale * math.sqrt(2 * math.log(2) * fan_in)


@torch.no_grad()
def rayleigh_(weight: Tensor, scale: float) -> Tensor:
    """Fill a planar weight in place with |w| ~ Rayleigh(scale) and uniform phase.

    Both planes are then independent normal variables of standard deviation ``scale``.
    """
    return weight.normal_(std=scale)


def riemann_zeros(count: int) -> Tensor:
    """Imaginary parts of the first non-trivial zeros of the Riemann zeta function, float64 (count,).

    The approximation 2 pi (n - 11/8) / W((n - 11/8) / e) of Franca and LeClair, "Statistical and other
    properties of Riemann zeros based on an explicit equation for the n-th zero", 2014; it is within
    half of the local spacing of the zeros. Lambert's W is found by Newton's method.
    """
    x = (torch.arange(1, count + 1, dtype=torch.float64) - 11 / 8) / math.e
    # The first zero has a negative argument close to the branch point, where W is about -0.2.
    w = torch.where(x < 1, x, x.clamp(min=1).log())
    for _ in range(50):
        w = w - (w * w.exp() - x) / (w.exp() * (w + 1))
    return 2 * math.pi * math.e * x / w


@torch.no_grad()
def zeta_(weight: Tensor, rms: float, zeta_scale: float = 1.0) -> Tensor:
    """Fill a planar embedding (V, 2, D) in place: Rayleigh moduli, phases spaced as the Riemann zeros.

    This is the seeds' ZetaInitializer.

    The phase of channel k of token v is ``zeta_scale`` * (v + 1) * gamma_k, gamma_k the k-th zero: no two
    channels turn at commensurable rates, so no two tokens share their phases.

    Args:
        rms: root mean square of the moduli.
    """
    tokens, _, channels = weight.shape
    moduli = torch.empty(tokens, channels).normal_().square()
    moduli = (moduli + torch.empty(tokens, channels).normal_().square()).sqrt() * (rms / math.sqrt(2))
    turns = riemann_zeros(channels) * (zeta_scale / (2 * math.pi))
    phase = torch.outer(torch.arange(1, tokens + 1, dtype=torch.float64), turns)
    phase = ((phase - phase.floor()) * (2 * math.pi)).float()
    weight[:, 0] = moduli * phase.cos()
    weight[:, 1] = moduli * phase.sin()
    return weight
