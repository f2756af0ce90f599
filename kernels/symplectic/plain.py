"""The potential of a flow, its force and the flow itself by plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)


def phi_of(a: Tensor, phi: str) -> Tensor:
    """phi(a)."""
    match phi:
        case "gelu_integral":
            cdf = 0.5 * (1 + torch.erf(a * SQRT_HALF))
            return 0.5 * ((a.square() - 1) * cdf + a * DENSITY * torch.exp(-0.5 * a.square()))
        case "silu":
            return F.silu(a)
        case "gelu":
            return F.gelu(a)
        case _:
            return F.softplus(a)


def slope_of(a: Tensor, phi: str) -> Tensor:
    """phi'(a)."""
    match phi:
        case "gelu_integral":
            return F.gelu(a)
        case "silu":
            sigmoid = torch.sigmoid(a)
            return sigmoid * (1 + a * (1 - sigmoid))
        case "gelu":
            return (
                0.5 * (1 + torch.erf(a * 0.5**0.5)) + a * torch.exp(-0.5 * a.square()) / (2 * math.pi) ** 0.5
            )
        case _:
            return torch.sigmoid(a)


def plain_force(
    q: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, phi: str = "gelu_integral", confinement: float = 0.0
) -> Tensor:
    """F(q) of q (..., D), in its dtype; products in that of the weights."""
    shared = b1.dim() == 1
    hidden = F.linear(q.to(w1.dtype), w1, b1 if shared else None)
    hidden = hidden if shared else hidden + b1
    force = ((-w2 * slope_of(hidden, phi)) @ w1).to(q.dtype)
    return force - confinement * q if confinement else force


def plain_flow(
    q: Tensor,
    p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: Sequence[float],
    drifts: Sequence[float],
    phi: str = "gelu_integral",
    confinement: float = 0.0,
    held: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """q and p after all stages, by autograd through the loop; ``held`` rounds the state and what is added."""
    q, p = held(q), held(p)
    for kick, drift in zip(kicks, drifts, strict=True):
        if kick:
            p = p + held(kick * plain_force(q, w1, b1, w2, phi, confinement))
        if drift:
            q = q + held(drift * p)
    return q, p
