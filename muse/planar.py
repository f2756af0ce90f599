"""Planar complex tensors: one real tensor with a plane axis at -2.

A planar tensor has shape (..., 2, D): plane 0 holds real parts, plane 1 imaginary parts. Its dtype
is float32, bfloat16 or float16 (or float64 in tests). ``z.flatten(-2)`` is (..., 2D) = [re | im],
ready for one real matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.planar import MODULUS_FLOOR, conjugate, modulus, modulus_floor, multiply, upcast

__all__ = [
    "MODULUS_FLOOR",
    "conjugate",
    "from_complex",
    "modulus",
    "modulus_floor",
    "multiply",
    "to_complex",
    "upcast",
]


def from_complex(c: Tensor) -> Tensor:
    """Convert complex64 or complex128 (..., D) to planar float32 or float64 (..., 2, D)."""
    return torch.stack((c.real, c.imag), dim=-2)


def to_complex(z: Tensor) -> Tensor:
    """Convert planar (..., 2, D) to complex (..., D): complex128 for float64, complex64 otherwise."""
    return torch.complex(*upcast(z).unbind(-2))
