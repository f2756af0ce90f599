"""The scan as one writes it down: what tests and benchmarks compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.planar import multiply, precise


def complex_scan(
    u: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token after token."""
    dtype = precise(u)
    turn = torch.stack((angle.to(dtype).cos(), angle.to(dtype).sin()))
    modulus = log_decay.to(dtype).exp().unsqueeze(-2)
    inputs = (1 - modulus.square()).sqrt() * u.to(dtype)
    g = torch.zeros_like(inputs[:, 0]) if state is None else state
    states = []
    for t in range(u.shape[1]):
        g = multiply(modulus[:, t] * turn, g) + inputs[:, t]
        states.append(g)
    return torch.stack(states, 1).to(u.dtype), g
