"""Rotary positions in Triton, bound by memory.

Traffic is given for T tokens of D channels and e bytes an element, so that one tensor is 2 T D e bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.complex_rotary.eager import empty_heads, empty_projection
from kernels.launch import pinned_beside
from kernels.tiles import by_tiles
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)


@jit
def _rotate_kernel(
    z, table, out, tokens, length, D,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < tokens) & (cols < D)
    at = rows.to(tl.int64) * (2 * D) + cols
    angle = (rows % length).to(tl.int64) * (2 * D) + cols
    cos = tl.load(table + angle, mask=mask, other=0.0)
    sin = tl.load(table + angle + D, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, re * cos - im * sin, mask=mask)
    tl.store(out + at + D, re * sin + im * cos, mask=mask)


@jit
def _split_heads_kernel(
    projection, q, k, v, table, tokens, length, heads, kv_heads, D,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of a few tokens a program; BACKWARD makes the projection's gradient of those of q, k and v."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < tokens) & (cols < D)
    plane = (heads + 2 * kv_heads) * D
    item = (rows // length).to(tl.int64)
    position = (rows % length).to(tl.int64)
    joined = projection + rows.to(tl.int64) * (2 * plane) + head * D + cols
    angle = table + position * (2 * D) + cols
    if head < heads:
        apart = q + ((item * heads + head) * length + position) * (2 * D) + cols
        _turn_head(joined, apart, angle, mask, plane, D, BACKWARD)
    elif head < heads + kv_heads:
        apart = k + ((item * kv_heads + head - heads) * length + position) * (2 * D) + cols
        _turn_head(joined, apart, angle, mask, plane, D, BACKWARD)
    else:
        apart = v + ((item * kv_heads + head - heads - kv_heads) * length + position) * (2 * D) + cols
        if BACKWARD:
            tl.store(joined, tl.load(apart, mask=mask), mask=mask)
            tl.store(joined + plane, tl.load(apart + D, mask=mask), mask=mask)
        else:
            tl.store(apart, tl.load(joined, mask=mask), mask=mask)
            tl.store(apart + D, tl.load(joined + plane, mask=mask), mask=mask)


@jit
def _turn_head(joined, apart, angle, mask, plane, D, BACKWARD: tl.constexpr):
    cos = tl.load(angle, mask=mask, other=0.0)
    sin = tl.load(angle + D, mask=mask, other=0.0)
    if BACKWARD:
        re = tl.load(apart, mask=mask, other=0.0).to(tl.float32)
        im = tl.load(apart + D, mask=mask, other=0.0).to(tl.float32)
        tl.store(joined, re * cos + im * sin, mask=mask)
        tl.store(joined + plane, im * cos - re * sin, mask=mask)
    else:
        re = tl.load(joined, mask=mask, other=0.0).to(tl.float32)
        im = tl.load(joined + plane, mask=mask, other=0.0).to(tl.float32)
        tl.store(apart, re * cos - im * sin, mask=mask)
        tl.store(apart + D, re * sin + im * cos, mask=mask)


def rotate(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """Reads z and writes out, 4 T D e bytes, and the table, 8 S D. 6 FLOPs a channel."""
    z, table = z.contiguous(), table.float().contiguous()
    out = torch.empty_like(z)
    numbers = z.shape[-3], z.shape[-1]
    by_tiles(PINNED, _rotate_kernel, z, z.shape[:-2].numel(), (z, table, out), numbers, INVERSE=inverse)
    return out


def _launch_split_heads(
    projection: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, backward: bool
) -> None:
    """Reads and writes the projection's size once, and the table. 6 FLOPs a channel of queries and keys."""
    (batch, heads, length, _, width), kv_heads = q.shape, k.shape[1]
    tensors, numbers = (projection, q, k, v, table.float().contiguous()), (length, heads, kv_heads, width)
    by_tiles(
        *(PINNED, _split_heads_kernel, projection, batch * length, tensors, numbers),
        *(heads, kv_heads, backward),
        heads=(heads + 2 * kv_heads,),
        BACKWARD=backward,
    )


def split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``complex_rotary.split_heads``."""
    q, k, v = empty_heads(projection, heads, kv_heads)
    _launch_split_heads(projection.contiguous(), q, k, v, table, backward=False)
    return q, k, v


def split_heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    """The gradient of the projection."""
    grad = empty_projection(grad_q, grad_k)
    q, k, v = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    _launch_split_heads(grad, q, k, v, table, backward=True)
    return grad


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, by a label; each call launches a forward and a backward kernel."""
    return {
        f"rotate and split_heads {str(dtype).removeprefix('torch.')}": partial(_compile_rotation, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    }


def _compile_rotation(dtype: torch.dtype) -> None:
    projection, table = torch.empty(2, 16, 2, 8, 64, dtype=dtype), torch.empty(16, 2, 64)
    q, k, v = split_heads(projection, table, 4, 2)
    split_heads_backward(q, k, v, table)
    rotate(q, table, inverse=False)
