"""Complex activations on planar tensors (..., 2, D).

Half precision is computed in float32. The gradient is finite everywhere, at z = 0 too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.planar import modulus, modulus_floor, upcast


class ModReLU(nn.Module):
    """ReLU(|z| + b) z / |z| (Arjovsky et al. 2016). With b = 0 it is the identity.

    Args:
        features: complex channels D, one offset b each.
        bias: initial b; where it is minus the median of |z| about half the units are off.
    """

    def __init__(self, features: int, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((features,), bias))

    def forward(self, z: Tensor) -> Tensor:
        x = upcast(z)
        size = modulus(x, modulus_floor(z.dtype))
        return (x * (F.relu(size + self.bias) / size).unsqueeze(-2)).to(z.dtype)


class ModSwish(nn.Module):
    """z sigmoid(beta |z| + b): a smooth ModReLU with a learned slope beta and offset b a channel."""

    def __init__(self, features: int, bias: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.full((features,), bias))

    def forward(self, z: Tensor) -> Tensor:
        x = upcast(z)
        gate = torch.sigmoid(self.slope * modulus(x) + self.bias)
        return (x * gate.unsqueeze(-2)).to(z.dtype)


class SplitGELU(nn.Module):
    """GELU on each plane."""

    def forward(self, z: Tensor) -> Tensor:
        return F.gelu(z)


class Cardioid(nn.Module):
    """(1 + cos arg z) z / 2 (Virtue et al. 2017)."""

    def forward(self, z: Tensor) -> Tensor:
        x = upcast(z)
        gate = 0.5 * (1 + x[..., 0, :] / modulus(x))
        return (x * gate.unsqueeze(-2)).to(z.dtype)


class ZReLU(nn.Module):
    """z where both planes are positive, else 0 (Guberman 2016)."""

    def forward(self, z: Tensor) -> Tensor:
        return z * (z > 0).all(-2, keepdim=True)


def build_activation(name: str, features: int, median: float) -> nn.Module:
    """Build the activation called ``name`` in the configuration.

    Args:
        features: complex channels.
        median: expected median of |z|; modulus gates start there, so that half the units are off.
    """
    match name:
        case "mod_relu":
            return ModReLU(features, bias=-median)
        case "mod_swish":
            return ModSwish(features, bias=-median)
        case "split_gelu":
            return SplitGELU()
        case "cardioid":
            return Cardioid()
        case "z_relu":
            return ZReLU()
    raise ValueError(f"unknown activation {name}")
