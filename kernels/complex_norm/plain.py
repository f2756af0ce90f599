"""The norms as one writes them down, with maths in float32: what tests and benchmarks compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.planar import multiply, upcast


def rms_norm(z: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """g z / sqrt(mean |z|^2 + eps)."""
    x = upcast(z)
    mean = x.square().sum((-2, -1), keepdim=True) / z.shape[-1]
    return multiply(x / (mean + eps).sqrt(), upcast(gain)).to(z.dtype)


def add_rms_norm(z: Tensor, branch: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The sum and its norm."""
    total = z + branch
    return total, rms_norm(total, gain, eps)


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Whitening by the formula of the covariance's inverse root, see ``complex_layer_norm``."""
    x = upcast(z)
    re, im = (x - x.mean(-1, keepdim=True)).unbind(-2)
    v_rr, v_ii = (part.square().mean(-1, keepdim=True) + eps for part in (re, im))
    v_ri = (re * im).mean(-1, keepdim=True)
    s = (v_rr * v_ii - v_ri.square()).sqrt()
    scale = 1 / (s * (v_rr + v_ii + 2 * s).sqrt())
    white_re = scale * ((v_ii + s) * re - v_ri * im)
    white_im = scale * ((v_rr + s) * im - v_ri * re)
    g_rr, g_ii, g_ri = upcast(gamma)
    y = torch.stack((g_rr * white_re + g_ri * white_im, g_ri * white_re + g_ii * white_im), -2)
    return (y + upcast(beta)).to(z.dtype)
