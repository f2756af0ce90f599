"""Complex activations on planar tensors (..., 2, D), see ``kernels.complex_activation``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.complex_activation import complex_activation
from kernels.complex_linear import complex_linear, complex_linear_activated


class ComplexActivation(nn.Module):
    """What the activations below share.

    Args:
        bias: initial offset b of each channel, if there is one.
        slope: initial slope of each channel, if there is one.
    """

    kind: str
    fused = True

    def __init__(self, bias: Tensor | None = None, slope: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)
        self.slope = None if slope is None else nn.Parameter(slope)

    def forward(self, z: Tensor) -> Tensor:
        return complex_activation(z, self.kind, self.bias, self.slope)

    def of_product(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The activation of W x, and W x: by one kernel on a GPU, if the product's kernel has it."""
        if self.fused:
            return complex_linear_activated(
                x, weight, activation=self.kind, offset=self.bias, slope=self.slope
            )
        hidden = complex_linear(x, weight)
        return self(hidden), hidden


class ModReLU(ComplexActivation):
    """ReLU(|z| + b) z / |z| (Arjovsky et al. 2016). With b = 0 it is the identity.

    Args:
        features: complex channels D, one offset b each.
        bias: initial b; where it is minus the median of |z| about half the units are off.
    """

    kind = "mod_relu"

    def __init__(self, features: int, bias: float = 0.0) -> None:
        super().__init__(torch.full((features,), bias))


class ModSwish(ComplexActivation):
    """z sigmoid(beta |z| + b): a smooth ModReLU with a learned slope beta and offset b a channel."""

    kind = "mod_swish"

    def __init__(self, features: int, bias: float = 0.0) -> None:
        super().__init__(torch.full((features,), bias), torch.ones(features))


class SplitGELU(ComplexActivation):
    """GELU on each plane."""

    kind = "split_gelu"


class Cardioid(ComplexActivation):
    """(1 + cos arg z) z / 2 (Virtue et al. 2017)."""

    kind = "cardioid"
    fused = False


class ZReLU(ComplexActivation):
    """z where both planes are positive, else 0 (Guberman 2016)."""

    kind = "z_relu"
    fused = False


def build_activation(name: str, features: int, median: float) -> ComplexActivation:
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
