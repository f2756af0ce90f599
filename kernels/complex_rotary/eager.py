"""Rotary positions in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks import _like, _precise, _read, _step, _to_write, _write


def _turn_eager(out: Tensor, z: Tensor, table: Tensor, inverse: bool) -> None:
    """Write planar z (N, S, 2, H, D) times the table (S, 2, D), or its conjugate, into ``out``."""
    batch, length, planes, heads, width = z.shape
    token = planes * heads * width
    span = min(length, _step(z, token))
    items = min(batch, _step(z, length * token))
    cos, sin = table.to(_precise(z)).unsqueeze(2).unbind(1)
    work = torch.empty(2, items, span, planes, heads, width, dtype=cos.dtype, device=z.device)
    for start in range(0, length, max(1, span)):
        here = slice(start, start + span)
        c, s = cos[here], sin[here]
        for first in range(0, batch, max(1, items)):
            chunk, result = z[first : first + items, here], out[first : first + items, here]
            a, b = work[:, : chunk.shape[0], : chunk.shape[1]]
            re, im = _read(chunk, a).unbind(2)
            y = _to_write(result, b)
            torch.mul(re, c, out=y[:, :, 0]).addcmul_(im, s, value=1 if inverse else -1)
            torch.mul(im, c, out=y[:, :, 1]).addcmul_(re, s, value=-1 if inverse else 1)
            _write(result, y)


def _rotate_eager(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    out = _like(z)
    turned, flat = (x.reshape(z.shape[:-3].numel(), *z.shape[-3:]).unsqueeze(-2) for x in (out, z))
    _turn_eager(turned, flat, table, inverse)
    return out


def _as_projected(heads: Tensor) -> Tensor:
    """(B, H, S, 2, d) seen as (B, S, 2, H, d)."""
    return heads.permute(0, 2, 3, 1, 4)


def _split_heads_eager(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, _, width = projection.shape
    outs = [projection.new_empty(batch, count, length, 2, width) for count in (heads, kv_heads, kv_heads)]
    parts = projection.split((heads, kv_heads, kv_heads), dim=3)
    for out, part in zip(outs[:2], parts[:2], strict=True):
        _turn_eager(_as_projected(out), part, table, inverse=False)
    _as_projected(outs[2]).copy_(parts[2])
    return outs[0], outs[1], outs[2]


def _split_heads_backward_eager(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    batch, heads, length, _, width = grad_q.shape
    kv_heads = grad_k.shape[1]
    grad = grad_q.new_empty(batch, length, 2, heads + 2 * kv_heads, width)
    q, k, v = grad.split((heads, kv_heads, kv_heads), dim=3)
    _turn_eager(q, _as_projected(grad_q), table, inverse=True)
    _turn_eager(k, _as_projected(grad_k), table, inverse=True)
    v.copy_(_as_projected(grad_v))
    return grad
