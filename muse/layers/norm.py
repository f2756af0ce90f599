"""Complex normalisation layers. Statistics are taken per token, over features only, in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from muse.planar import upcast


class _ComplexRMSNorm(torch.autograd.Function):
    """Keeps the input and one number a token; everything else is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = upcast(z)
        length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        rstd = (length.square() / z.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(z, gain, rstd)
        return _complex_scale(x, upcast(gain)).mul_(rstd).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, gain, rstd = ctx.saved_tensors
        normal, grad_y = upcast(z) * rstd, upcast(grad)
        g_re, g_im = upcast(gain)
        width = z.shape[-1:]
        n_re, n_im = normal.unbind(-2)
        y_re, y_im = grad_y.unbind(-2)
        grad_gain = torch.stack(
            (
                (n_re * y_re).add_(n_im * y_im).sum_to_size(width),
                (n_re * y_im).sub_(n_im * y_re).sum_to_size(width),
            )
        )
        grad_n = _complex_scale(grad_y, torch.stack((g_re, -g_im)))
        mean = (normal * grad_n).sum((-2, -1), keepdim=True) / z.shape[-1]
        grad_z = grad_n.sub_(normal.mul_(mean)).mul_(rstd)
        return grad_z.to(z.dtype), grad_gain.to(gain.dtype), None


def _complex_scale(z: Tensor, gain: Tensor) -> Tensor:
    """Complex product of planar z (..., 2, D) and gain (2, D), without temporaries of z's size to spare."""
    z_re, z_im = z.unbind(-2)
    out = torch.empty_like(z)
    out[..., 0, :].copy_(z_re).mul_(gain[0]).addcmul_(z_im, gain[1], value=-1)
    out[..., 1, :].copy_(z_re).mul_(gain[1]).addcmul_(z_im, gain[0])
    return out


class ComplexRMSNorm(nn.Module):
    """g * z / sqrt(mean_D |z|^2 + eps) with a complex gain g: equivariant under a global phase.

    Args:
        features: complex channels D.
        eps: added to the mean square.
    """

    plane_axes = {"gain": 0}

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.stack((torch.ones(features), torch.zeros(features))))
        self.eps = eps

    def forward(self, z: Tensor) -> Tensor:
        return _ComplexRMSNorm.apply(z, self.gain, self.eps)


class ComplexLayerNorm(nn.Module):
    """Whitening by the 2x2 covariance of the planes over features, then an affine map.

    With V the covariance, s = sqrt(det V) and t = sqrt(V_rr + V_ii + 2 s), the whitening matrix is
    V^(-1/2) = [[V_ii + s, -V_ri], [-V_ri, V_rr + s]] / (s t) (Trabelsi et al. 2018). The affine map is
    the symmetric 2x2 matrix Gamma, initially I / sqrt(2) so that E|z|^2 = 1, and the shift beta.

    Args:
        features: complex channels D.
        eps: added to the diagonal of V.
    """

    plane_axes = {"beta": 0}

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        diagonal = torch.full((features,), 1 / math.sqrt(2))
        self.gamma = nn.Parameter(torch.stack((diagonal, diagonal.clone(), torch.zeros(features))))
        self.beta = nn.Parameter(torch.zeros(2, features))
        self.eps = eps

    def forward(self, z: Tensor) -> Tensor:
        x = upcast(z)
        re, im = (x - x.mean(-1, keepdim=True)).unbind(-2)
        v_rr = re.square().mean(-1, keepdim=True) + self.eps
        v_ii = im.square().mean(-1, keepdim=True) + self.eps
        v_ri = (re * im).mean(-1, keepdim=True)
        # Rounding must not make the determinant of nearly dependent planes negative.
        s = (v_rr * v_ii - v_ri.square()).clamp(min=self.eps**2).sqrt()
        scale = 1 / (s * (v_rr + v_ii + 2 * s).sqrt())
        white_re = ((v_ii + s) * re - v_ri * im) * scale
        white_im = ((v_rr + s) * im - v_ri * re) * scale
        g_rr, g_ii, g_ri = upcast(self.gamma)
        out = torch.stack((g_rr * white_re + g_ri * white_im, g_ri * white_re + g_ii * white_im), dim=-2)
        return (out + self.beta).to(z.dtype)
