"""Rotary positions as one writes them down: what tests and benchmarks compare with."""

from __future__ import annotations

from torch import Tensor

from kernels.planar import conjugate, multiply, upcast


def rotate(z: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """The angles stay in float32."""
    x = upcast(z)
    table = table.to(x.dtype)
    return multiply(x, conjugate(table) if inverse else table).to(z.dtype)


def split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and values, each a copy."""
    q, k, v = projection.permute(0, 3, 1, 2, 4).split((heads, kv_heads, kv_heads), dim=1)
    return rotate(q, table), rotate(k, table), v.contiguous()
