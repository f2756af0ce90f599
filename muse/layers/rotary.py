"""Rotary positions (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from muse.planar import upcast


def rotary_table(positions: Tensor, channels: int, base: float = 10000.0) -> Tensor:
    """e^{i n omega_k} with omega_k = base^(-k / channels), planar float32 (positions, 2, channels)."""
    omega = base ** (-torch.arange(channels, device=positions.device, dtype=torch.float64) / channels)
    angle = torch.outer(positions.double(), omega)
    return torch.stack((angle.cos(), angle.sin()), dim=-2).float()


def rotate(z: Tensor, table: Tensor) -> Tensor:
    """z_k e^{i n omega_k}: a complex tensor turned by its position.

    A score q conj(k) of rotated q and k depends on the difference of their positions only.

    Args:
        z: planar (..., S, 2, D).
        table: planar (S, 2, D), from ``rotary_table``.
    """
    re, im = upcast(z).unbind(-2)
    cos, sin = table.to(re.dtype).unbind(-2)
    return torch.stack((re * cos - im * sin, re * sin + im * cos), dim=-2).to(z.dtype)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """The rotary embedding of a real tensor (..., S, d): halves of the channels are the planes."""
    return rotate(x.unflatten(-1, (2, x.shape[-1] // 2)), table).flatten(-2)
