"""Rotary positions in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks import chunk_length, like, read, to_write, write
from kernels.planar import precise


def _turn(out: Tensor, z: Tensor, table: Tensor, inverse: bool) -> None:
    """Write planar z (N, S, 2, H, D) times the table (S, 2, D), or its conjugate, into ``out``."""
    batch, length, planes, heads, width = z.shape
    token = planes * heads * width
    span = min(length, chunk_length(z, token))
    items = min(batch, chunk_length(z, length * token))
    cos, sin = table.to(precise(z)).unsqueeze(2).unbind(1)
    work = torch.empty(2, items, span, planes, heads, width, dtype=cos.dtype, device=z.device)
    for start in range(0, length, max(1, span)):
        here = slice(start, start + span)
        c, s = cos[here], sin[here]
        for first in range(0, batch, max(1, items)):
            chunk, result = z[first : first + items, here], out[first : first + items, here]
            a, b = work[:, : chunk.shape[0], : chunk.shape[1]]
            re, im = read(chunk, a).unbind(2)
            y = to_write(result, b)
            torch.mul(re, c, out=y[:, :, 0]).addcmul_(im, s, value=1 if inverse else -1)
            torch.mul(im, c, out=y[:, :, 1]).addcmul_(re, s, value=-1 if inverse else 1)
            write(result, y)


def rotate(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """As ``complex_rotary.rotate``."""
    out = like(z)
    turned, flat = (x.reshape(z.shape[:-3].numel(), *z.shape[-3:]).unsqueeze(-2) for x in (out, z))
    _turn(turned, flat, table, inverse)
    return out


def _as_projected(heads: Tensor) -> Tensor:
    """(B, H, S, 2, d) seen as (B, S, 2, H, d)."""
    return heads.permute(0, 2, 3, 1, 4)


def empty_heads(projection: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values to be written."""
    batch, length, _, _, width = projection.shape
    q, k, v = (projection.new_empty(batch, count, length, 2, width) for count in (heads, kv_heads, kv_heads))
    return q, k, v


def empty_projection(q: Tensor, k: Tensor) -> Tensor:
    """The projection of q, k and v, to be written."""
    batch, heads, length, _, width = q.shape
    return q.new_empty(batch, length, 2, heads + 2 * k.shape[1], width)


def split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``complex_rotary.split_heads``."""
    outs = empty_heads(projection, heads, kv_heads)
    parts = projection.split((heads, kv_heads, kv_heads), dim=3)
    for out, part in zip(outs[:2], parts[:2], strict=True):
        _turn(_as_projected(out), part, table, inverse=False)
    _as_projected(outs[2]).copy_(parts[2])
    return outs


def split_heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    """The gradient of the projection."""
    heads, kv_heads = grad_q.shape[1], grad_k.shape[1]
    grad = empty_projection(grad_q, grad_k)
    q, k, v = grad.split((heads, kv_heads, kv_heads), dim=3)
    _turn(q, _as_projected(grad_q), table, inverse=True)
    _turn(k, _as_projected(grad_k), table, inverse=True)
    v.copy_(_as_projected(grad_v))
    return grad
