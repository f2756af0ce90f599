"""Rotary positions of planar complex tensors, alone and on the way from a projection to heads.

Maths is float32, and float64 for float64, which only the eager implementation takes; a result is rounded
once, when written. What is kept for the backward pass is the table.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.chunks import like
from kernels.complex_rotary import eager, triton_code
from kernels.launch import use_triton
from kernels.operator import operator

__all__ = ["rotate", "split_heads"]


def rotate(z: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """z_k e^{i n omega_k}: a complex tensor turned by its position n (Su et al., RoFormer, 2021).

    A score q conj(k) of rotated q and k depends on the difference of their positions only. The table is taken
    as a constant, and its numbers must have modulus 1 for ``inverse`` to undo the rotation.

    Args:
        z: planar (..., S, 2, D).
        table: planar (S, 2, D), e^{i n omega_k}.
        inverse: turn back, by the conjugate table.

    Returns:
        Planar, shape and dtype of z.

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.ndim < 3 or table.shape != z.shape[-3:] or z.shape[-2] != 2:
        raise ValueError(f"z of shape {tuple(z.shape)} does not fit a table of shape {tuple(table.shape)}")
    return _complex_rotate(z, table, inverse)


def split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values, from one projection.

    Forward and backward write each result once, in the layout in which the next product reads it.

    Args:
        projection: planar (B, S, 2, heads + 2 kv_heads, d): queries, keys, values.
        table: planar (S, 2, d), as in ``rotate``.
        heads: query heads.
        kv_heads: key and value heads.

    Returns:
        Contiguous planar q (B, heads, S, 2, d), k and v (B, kv_heads, S, 2, d).

    Raises:
        ValueError: shapes that do not fit.
    """
    length, width = (projection.shape[1], projection.shape[4]) if projection.ndim == 5 else (0, 0)
    if projection.shape[2:4] != (2, heads + 2 * kv_heads) or table.shape != (length, 2, width):
        raise ValueError(
            f"projection of shape {tuple(projection.shape)} and table of shape {tuple(table.shape)} do not "
            f"fit {heads} query heads and {kv_heads} key and value heads"
        )
    return _complex_split_heads(projection, table, heads, kv_heads)


@operator
def _complex_rotate(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    code = triton_code if use_triton(z) else eager
    return code.rotate(z, table, inverse)


@operator
def _complex_split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(projection) else eager
    return code.split_heads(projection, table, heads, kv_heads)


@operator
def _complex_split_heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    code = triton_code if use_triton(grad_q) else eager
    return code.split_heads_backward(grad_q, grad_k, grad_v, table)


_complex_rotate.register_fake(lambda z, *_: like(z))
_complex_split_heads.register_fake(
    lambda projection, table, heads, kv_heads: eager.empty_heads(projection, heads, kv_heads)
)
_complex_split_heads_backward.register_fake(lambda q, k, *_: eager.empty_projection(q, k))


def _keep_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _differentiate_rotate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _complex_rotate(grad, *ctx.saved_tensors, not ctx.inverse), None, None


def _keep_split_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_split_heads(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    return _complex_split_heads_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None, None


_complex_rotate.register_autograd(_differentiate_rotate, setup_context=_keep_rotate)
_complex_split_heads.register_autograd(_differentiate_split_heads, setup_context=_keep_split_heads)
