"""Rotary positions (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.complex_rotary import rotate


def rotary_table(positions: Tensor, channels: int, base: float = 10000.0) -> Tensor:
    """e^{i n omega_k} with omega_k = base^(-k / channels), planar float32 (positions, 2, channels)."""
    omega = base ** (-torch.arange(channels, device=positions.device, dtype=torch.float64) / channels)
    angle = torch.outer(positions.double(), omega)
    return torch.stack((angle.cos(), angle.sin()), dim=-2).float()


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """The rotary embedding of a real tensor (..., S, d): halves of the channels are the planes."""
    return rotate(x.unflatten(-1, (2, x.shape[-1] // 2)), table).flatten(-2)
