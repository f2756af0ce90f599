"""Complex normalisation layers. Statistics are taken per token, over features only, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm


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
        return complex_rms_norm(z, self.gain, self.eps)

    def of_sum(self, z: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """z + branch, and its norm, in one pass."""
        return add_complex_rms_norm(z, branch.to(z.dtype), self.gain, self.eps)


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
        return complex_layer_norm(z, self.gamma, self.beta, self.eps)

    def of_sum(self, z: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """z + branch, and its norm."""
        total = z + branch
        return total, self(total)
