"""What the operations share about planar tensors (..., 2, D): plane 0 real parts, plane 1 imaginary."""

from __future__ import annotations

import torch
from torch import Tensor

# The smallest modulus that is divided by: z / max(|z|, floor) keeps gradients at 0 finite.
MODULUS_FLOOR = 1e-6


def modulus_floor(dtype: torch.dtype) -> float:
    """The floor for maths on values of ``dtype``: gradients of order 1/floor must not overflow float16."""
    return 1e-3 if dtype == torch.float16 else MODULUS_FLOOR


def modulus(z: Tensor, floor: float = MODULUS_FLOOR) -> Tensor:
    """|z| of planar (..., 2, D) as (..., D), never below ``floor`` and differentiable at 0."""
    re, im = z.unbind(-2)
    # A sum over an axis of two is slow; this takes half the time on the CPU.
    return re.square().addcmul_(im, im).add_(floor**2).sqrt_()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise complex product of planar tensors that broadcast to each other."""
    a_re, a_im = a.unbind(-2)
    b_re, b_im = b.unbind(-2)
    return torch.stack((a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re), dim=-2)


def conjugate(z: Tensor) -> Tensor:
    """Complex conjugate of a planar tensor."""
    re, im = z.unbind(-2)
    return torch.stack((re, -im), dim=-2)


def precise(x: Tensor) -> torch.dtype:
    """The dtype of maths outside products: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of its maths."""
    return x.to(precise(x))


def check_planar(z: Tensor, **parameters: tuple[Tensor, int]) -> None:
    """Refuse what is not planar (..., 2, D), and named parameters that are not so many rows of D."""
    if z.ndim < 2 or z.shape[-2] != 2:
        raise ValueError(f"a planar tensor (..., 2, D) is needed, not one of shape {tuple(z.shape)}")
    for name, (parameter, rows) in parameters.items():
        if parameter.shape != (rows, z.shape[-1]):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not ({rows}, {z.shape[-1]})")
