"""Inputs of complex_scan."""

from __future__ import annotations

import math

import torch

# Eigenvalues from those that forget at once to those that hardly do.
SLOWEST, FASTEST = 1e-4, 5.0


def scan_inputs(batch, length, channels, dtype=torch.float64, device="cpu"):
    """u and the state in ``dtype``; log_decay and angle are at least float32, as they are under autocast."""
    precise = torch.promote_types(dtype, torch.float32)
    u = torch.randn(batch, length, 2, channels).to(device, dtype)
    exponents = torch.empty(batch, length, channels).uniform_(math.log(SLOWEST), math.log(FASTEST))
    angle = torch.empty(channels).uniform_(-math.pi, math.pi)
    state = torch.randn(batch, 2, channels)
    return [u, -exponents.exp().to(device, precise), angle.to(device, precise), state.to(device, precise)]
