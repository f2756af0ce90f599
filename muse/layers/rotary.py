"""Rotary positions (Su et al., RoFormer, 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muse.planar import upcast


def rotary_table(positions: Tensor, channels: int, base: float = 10000.0) -> Tensor:
    """e^{i n omega_k} with omega_k = base^(-k / channels), planar float32 (positions, 2, channels)."""
    omega = base ** (-torch.arange(channels, device=positions.device, dtype=torch.float64) / channels)
    angle = torch.outer(positions.double(), omega)
    return torch.stack((angle.cos(), angle.sin()), dim=-2).float()


class _Rotation(torch.autograd.Function):
    """z times the table, in float32; the gradient is turned back by the conjugate table."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        turn_into(out, z, *table.unbind(-2))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        cos, sin = table.unbind(-2)
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        turn_into(out, grad, cos, -sin)
        return out, None


def turn_into(out: Tensor, z: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write planar z (..., S, 2, D) times cos + i sin (S, D), computed in float32, into ``out``."""
    re, im = upcast(z).unbind(-2)
    cos, sin = cos.to(re.dtype), sin.to(re.dtype)
    out[..., 0, :] = (re * cos).addcmul_(im, sin, value=-1)
    out[..., 1, :] = (re * sin).addcmul_(im, cos)


def rotate(z: Tensor, table: Tensor) -> Tensor:
    """z_k e^{i n omega_k}: a complex tensor turned by its position.

    A score q conj(k) of rotated q and k depends on the difference of their positions only. The table is
    taken as a constant.

    Args:
        z: planar (..., S, 2, D).
        table: planar (S, 2, D), from ``rotary_table``.
    """
    return _Rotation.apply(z, table)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """The rotary embedding of a real tensor (..., S, d): halves of the channels are the planes."""
    return rotate(x.unflatten(-1, (2, x.shape[-1] // 2)), table).flatten(-2)
