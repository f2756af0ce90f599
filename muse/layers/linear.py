"""ComplexLinear: a planar complex matrix product as one real product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.layers.init import rayleigh_, rayleigh_scale


def real_form(weight: Tensor) -> Tensor:
    """[[W_r, -W_i], [W_i, W_r]], (2 out, 2 in): acts on [re | im] as the weight (2, out, in) acts on z."""
    real, imag = weight
    out_features, in_features = real.shape
    form = weight.new_empty(2, out_features, 2, in_features)
    form[0, :, 0] = real
    form[1, :, 1] = real
    form[1, :, 0] = imag
    form[0, :, 1] = -imag
    return form.view(2 * out_features, 2 * in_features)


class _ComplexProduct(torch.autograd.Function):
    """y = W x on planes. The real form of W is built again in the backward pass, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.flatten(-2), real_form(weight)).unflatten(-1, (2, weight.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, 2 * weight.shape[1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ real_form(weight)).view(x.shape)
        if ctx.needs_input_grad[1]:
            form = rows.t() @ x.reshape(-1, 2 * weight.shape[2])
            form = form.view(2, weight.shape[1], 2, weight.shape[2])
            grad_weight = torch.stack((form[0, :, 0] + form[1, :, 1], form[1, :, 0] - form[0, :, 1]))
        return grad_x, grad_weight


def complex_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_r = x_r W_r^T - x_i W_i^T + b_r, y_i = x_r W_i^T + x_i W_r^T + b_i, by four real products in one.

    Args:
        x: planar (..., 2, in).
        weight: (2, out, in).
        bias: (2, out).

    Returns:
        Planar (..., 2, out), in autocast's dtype where autocast is on.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    y = _ComplexProduct.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


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
