"""ComplexLinear: a complex affine map of planar tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.complex_linear import complex_linear
from muse.layers.init import rayleigh_, rayleigh_scale


class ComplexLinear(nn.Module):
    """A complex affine map on planar tensors.

    Args:
        in_features: complex channels of the input.
        out_features: complex channels of the output.
        bias: whether a complex bias is added.
        init: ``glorot`` or ``he`` (Trabelsi et al. 2018).
        gain: factor on the initial weights, e.g. 1/sqrt(2 layers) at the end of a residual branch.
    """

    plane_axes = {"weight": 0, "bias": 0}

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init: str = "glorot", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(2, out_features)) if bias else None
        rayleigh_(self.weight, gain * rayleigh_scale(in_features, out_features, init))

    def forward(self, x: Tensor) -> Tensor:
        return complex_linear(x, self.weight, self.bias)
