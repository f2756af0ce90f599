"""The activations as one writes them down: what tests and benchmarks compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.complex_activation.eager import activation_floor
from kernels.planar import modulus, upcast


def activation(z: Tensor, kind: str, *parameters: Tensor, floor: float | None = None) -> Tensor:
    """The formulas of ``complex_activation``; gates of half precision are computed in float32, as there."""
    if kind == "split_gelu":
        return F.gelu(z)
    if kind == "z_relu":
        return z * (z > 0).all(-2, keepdim=True)
    x = upcast(z)
    size = modulus(x, activation_floor(z, kind) if floor is None else floor)
    if kind == "mod_relu":
        (offset,) = parameters
        gate = F.relu(size + offset) / size
    elif kind == "mod_swish":
        offset, slope = parameters
        gate = torch.sigmoid(slope * size + offset)
    else:
        gate = 0.5 * (1 + x[..., 0, :] / size)
    return (x * gate.unsqueeze(-2)).to(z.dtype)
