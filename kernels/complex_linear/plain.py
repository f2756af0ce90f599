"""The planar product as one writes it down: what tests and benchmarks compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.complex_activation.plain import activation as activate


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, products: int = 4
) -> Tensor:
    """The definition, by four products or by Gauss's three."""
    (x_re, x_im), (w_re, w_im) = x.unbind(-2), weight
    if products == 3:
        first, second = F.linear(x_re, w_re), F.linear(x_im, w_im)
        y = torch.stack((first - second, F.linear(x_re + x_im, w_re + w_im) - first - second), -2)
    else:
        re = F.linear(x_re, w_re) - F.linear(x_im, w_im)
        y = torch.stack((re, F.linear(x_re, w_im) + F.linear(x_im, w_re)), -2)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def linear_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    activation: str,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Active and hidden, one operation after the other."""
    hidden = linear(x, weight, bias)
    active = activate(hidden, activation, *(p for p in (offset, slope) if p is not None), floor=floor)
    return (active if residual is None else active + residual), hidden


def real_form(weight: Tensor) -> Tensor:
    """(2 out, 2 in): acts on concatenated planes as the weight (2, out, in) on complex numbers."""
    re, im = weight
    return torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)))


def by_real_form(x: Tensor, form: Tensor) -> Tensor:
    """One real product on concatenated planes."""
    return F.linear(x.flatten(-2), form).unflatten(-1, (2, -1))
