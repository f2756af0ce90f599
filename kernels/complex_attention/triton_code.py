"""Complex attention in Triton.

A program holds a block of queries (or of keys) and passes over the other side, as in FlashAttention-2
(Dao, 2023). The planes are separate tiles, so that a complex product is four real ones on tiles that were
loaded once. Scores stay unscaled; ``floor`` is the square of the floor of |s| in these units.
Exponentials are powers of two. The pointers of q, k, v and the gradient of the output come with their
strides along batch, heads and positions; what the wrappers allocate is contiguous, (batch, heads,
positions, 2, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.complex_attention.eager import SCORES, Mask
from kernels.launch import Options, ceil_div, contiguous, launch, next_power_of_2, pinned_beside
from kernels.planar import modulus_floor
from kernels.triton_import import jit, jit_unspecialised, tl

PINNED = pinned_beside(__file__)

# One argument a line would hide the kernels.
# fmt: off

# One binary serves every number of heads and every length: decoding must not compile at each length that is
# a multiple of 16.
_jit = jit_unspecialised("heads", "kv_heads", "group", "q_length", "k_length", "longest")
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@jit
def _place(cu_seqlens, heads, q_length, k_length, blocks, VARIABLE: tl.constexpr):
    """Block, batch entry and head of this program; first token and lengths of its sequence.

    All are folded into one axis of the grid, because the others end at 65535; the blocks of a head are
    neighbours, which share its keys in the L2 cache.
    """
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    if VARIABLE:
        start = tl.load(cu_seqlens + batch).to(tl.int64)
        q_length = (tl.load(cu_seqlens + batch + 1) - start).to(tl.int32)
        k_length = q_length
        batch = batch * 0
    return block, batch, head, start, q_length, k_length


@jit
def _addresses(pointer, rows, stride, limit, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses of rows of the real plane, (rows, BLOCK_D), and which of them exist."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    address = pointer + rows[:, None].to(tl.int64) * stride + channel
    inside = (rows[:, None] < limit) & (channel < WIDTH)
    return address, inside


@jit
def _load(pointer, rows, stride, limit, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Both planes of rows of a planar tensor, 0 where there is nothing."""
    address, inside = _addresses(pointer, rows, stride, limit, WIDTH, BLOCK_D)
    return tl.load(address, mask=inside, other=0.0), tl.load(address + WIDTH, mask=inside, other=0.0)


@jit
def _store(pointer, re, im, rows, stride, limit, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write both planes of rows of a planar tensor."""
    address, inside = _addresses(pointer, rows, stride, limit, WIDTH, BLOCK_D)
    tl.store(address, re.to(pointer.dtype.element_ty), mask=inside)
    tl.store(address + WIDTH, im.to(pointer.dtype.element_ty), mask=inside)


@jit
def _two(a, b, c, d, acc):
    """acc + a b + c d."""
    acc = tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(c, d, acc, input_precision="ieee")


@jit
def _size(s_re, s_im, floor, SCORE: tl.constexpr):
    """|s|, or Re s for the score kind ``real``."""
    return s_re if SCORE == "real" else tl.sqrt(s_re * s_re + s_im * s_im + floor)


@jit
def _visible(query, key, q_length, k_length, CAUSAL: tl.constexpr):
    """Which keys exist and are not in the future of a query."""
    visible = key < k_length
    if CAUSAL:
        visible = visible & (key <= query + (k_length - q_length))
    return visible


@jit
def _score_gradient(p, s_re, s_im, size, c_re, c_im, delta, scale, SCORE: tl.constexpr):
    """Gradient of the scaled scores, see the formulas above."""
    if SCORE == "real":
        ds_re = p * (c_re - delta)
        ds_im = ds_re
    elif SCORE == "magnitude":
        slope = p * (c_re - delta) / size
        ds_re = slope * s_re
        ds_im = slope * s_im
    else:
        inverse = 1.0 / size
        u_re = s_re * inverse
        u_im = s_im * inverse
        along = c_re * u_re + c_im * u_im
        turning = p * inverse / scale
        slope = p * (along - delta) - turning * along
        ds_re = u_re * slope + turning * c_re
        ds_im = u_im * slope + turning * c_im
    return ds_re, ds_im


@jit
def _attend(
    out_re, out_im, largest, total, q_re, q_im, minus_q_re, k, v, k_s, v_s, query, first, last, q_length,
    k_length, rate, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Pass over keys ``first`` to ``last``: running output, maximum and sum of exponentials."""
    for n in range(first, last, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k_re, k_im = _load(k, key, k_s, k_length, WIDTH, BLOCK_D)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s_re = _two(q_re, tl.trans(k_re), q_im, tl.trans(k_im), zero)
        s_im = zero
        if SCORE != "real":
            s_im = _two(q_im, tl.trans(k_re), minus_q_re, tl.trans(k_im), zero)
        size = _size(s_re, s_im, floor, SCORE)
        logit = size
        if MASKED:
            visible = _visible(query[:, None], key[None, :], q_length, k_length, CAUSAL)
            logit = tl.where(visible, size, float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, 1))
        p = tl.exp2((logit - larger[:, None]) * rate)
        shrink = tl.exp2((largest - larger) * rate)
        total = total * shrink + tl.sum(p, 1)
        largest = larger
        out_re = out_re * shrink[:, None]
        out_im = out_im * shrink[:, None]
        v_re, v_im = _load(v, key, v_s, k_length, WIDTH, BLOCK_D)
        if SCORE == "phase":
            p = p / size
            w_re = (p * s_re).to(v_re.dtype)
            w_im = p * s_im
            out_re = _two(w_re, v_re, (-w_im).to(v_re.dtype), v_im, out_re)
            out_im = _two(w_re, v_im, w_im.to(v_re.dtype), v_re, out_im)
        else:
            weight = p.to(v_re.dtype)
            out_re = tl.dot(weight, v_re, out_re, input_precision="ieee")
            out_im = tl.dot(weight, v_im, out_im, input_precision="ieee")
    return out_re, out_im, largest, total


@_jit
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, heads, group, q_length,
    k_length, longest, scale, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr, VARIABLE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp, in units of unscaled scores, of a block of queries.

    Memory: q and the output once, k and v once a block of queries (from the L2 cache when the heads fit).
    """
    positions = q_length
    blocks = tl.cdiv(longest, BLOCK_M)
    block, batch, head, start, q_length, k_length = _place(
        cu_seqlens, heads, q_length, k_length, blocks, VARIABLE
    )
    # The last blocks have most to do under a causal mask, so they start first.
    m = (blocks - 1 - block) * BLOCK_M
    if m < q_length:
        query = m + tl.arange(0, BLOCK_M)
        q += batch * q_b + head * q_h + start * q_s
        k += batch * k_b + (head // group) * k_h + start * k_s
        v += batch * v_b + (head // group) * v_h + start * v_s
        row = (batch * heads + head) * positions + start
        q_re, q_im = _load(q, query, q_s, q_length, WIDTH, BLOCK_D)
        minus_q_re = -q_re
        out_re = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        out_im = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        rate = scale * LOG2_E
        last = k_length
        whole = k_length // BLOCK_N * BLOCK_N
        if CAUSAL:
            shift = k_length - q_length
            last = tl.minimum(k_length, m + BLOCK_M + shift)
            whole = tl.minimum(whole, (m + shift + 1) // BLOCK_N * BLOCK_N)
        out_re, out_im, largest, total = _attend(
            out_re, out_im, largest, total, q_re, q_im, minus_q_re, k, v, k_s, v_s, query, 0, whole, q_length,
            k_length, rate, floor, SCORE, CAUSAL, False, WIDTH, BLOCK_D, BLOCK_M,
            BLOCK_N,
        )
        out_re, out_im, largest, total = _attend(
            out_re, out_im, largest, total, q_re, q_im, minus_q_re, k, v, k_s, v_s, query, whole, last,
            q_length, k_length, rate, floor, SCORE, CAUSAL, True, WIDTH, BLOCK_D,
            BLOCK_M, BLOCK_N,
        )
        out += row * (2 * WIDTH)
        _store(
            out, out_re / total[:, None], out_im / total[:, None], query, 2 * WIDTH, q_length, WIDTH, BLOCK_D
        )
        tl.store(lse + row + query, largest + tl.log2(total) / rate, mask=query < q_length)


@jit
def _query_gradient(
    dq_re, dq_im, q_re, q_im, minus_q_re, g_re, g_im, minus_g_re, k, v, k_s, v_s, lse, delta, query, first,
    last, q_length, k_length, scale, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Pass over keys ``first`` to ``last``: ds k."""
    for n in range(first, last, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k_re, k_im = _load(k, key, k_s, k_length, WIDTH, BLOCK_D)
        v_re, v_im = _load(v, key, v_s, k_length, WIDTH, BLOCK_D)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s_re = _two(q_re, tl.trans(k_re), q_im, tl.trans(k_im), zero)
        s_im = zero
        if SCORE != "real":
            s_im = _two(q_im, tl.trans(k_re), minus_q_re, tl.trans(k_im), zero)
        size = _size(s_re, s_im, floor, SCORE)
        p = tl.exp2((size - lse[:, None]) * (scale * LOG2_E))
        if MASKED:
            p = tl.where(_visible(query[:, None], key[None, :], q_length, k_length, CAUSAL), p, 0.0)
        c_re = _two(g_re, tl.trans(v_re), g_im, tl.trans(v_im), zero)
        c_im = zero
        if SCORE == "phase":
            c_im = _two(g_im, tl.trans(v_re), minus_g_re, tl.trans(v_im), zero)
        ds_re, ds_im = _score_gradient(p, s_re, s_im, size, c_re, c_im, delta[:, None], scale, SCORE)
        if SCORE == "real":
            dq_re = tl.dot(ds_re.to(k_re.dtype), k_re, dq_re, input_precision="ieee")
            dq_im = tl.dot(ds_re.to(k_re.dtype), k_im, dq_im, input_precision="ieee")
        else:
            w_re = ds_re.to(k_re.dtype)
            dq_re = _two(w_re, k_re, (-ds_im).to(k_re.dtype), k_im, dq_re)
            dq_im = _two(w_re, k_im, ds_im.to(k_re.dtype), k_re, dq_im)
    return dq_re, dq_im


@_jit
def _query_gradient_kernel(
    q, k, v, grad, out, lse, delta, dq, cu_seqlens, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h,
    g_s, heads, group, q_length, k_length, longest, scale, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr,
    VARIABLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of a block of queries, and delta = Re(g conj(out)) for the gradients of the keys.

    Memory: q, the output and its gradient once, k and v once a block of queries.
    """
    positions = q_length
    blocks = tl.cdiv(longest, BLOCK_M)
    block, batch, head, start, q_length, k_length = _place(
        cu_seqlens, heads, q_length, k_length, blocks, VARIABLE
    )
    m = (blocks - 1 - block) * BLOCK_M
    if m < q_length:
        query = m + tl.arange(0, BLOCK_M)
        q += batch * q_b + head * q_h + start * q_s
        k += batch * k_b + (head // group) * k_h + start * k_s
        v += batch * v_b + (head // group) * v_h + start * v_s
        grad += batch * g_b + head * g_h + start * g_s
        row = (batch * heads + head) * positions + start
        g_re, g_im = _load(grad, query, g_s, q_length, WIDTH, BLOCK_D)
        o_re, o_im = _load(out + row * (2 * WIDTH), query, 2 * WIDTH, q_length, WIDTH, BLOCK_D)
        row_delta = tl.sum(
            g_re.to(tl.float32) * o_re.to(tl.float32) + g_im.to(tl.float32) * o_im.to(tl.float32), 1
        )
        tl.store(delta + row + query, row_delta, mask=query < q_length)
        row_lse = tl.load(lse + row + query, mask=query < q_length, other=float("inf"))
        q_re, q_im = _load(q, query, q_s, q_length, WIDTH, BLOCK_D)
        minus_q_re, minus_g_re = -q_re, -g_re
        dq_re = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dq_im = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        last = k_length
        whole = k_length // BLOCK_N * BLOCK_N
        if CAUSAL:
            shift = k_length - q_length
            last = tl.minimum(k_length, m + BLOCK_M + shift)
            whole = tl.minimum(whole, (m + shift + 1) // BLOCK_N * BLOCK_N)
        dq_re, dq_im = _query_gradient(
            dq_re, dq_im, q_re, q_im, minus_q_re, g_re, g_im, minus_g_re, k, v, k_s, v_s, row_lse, row_delta,
            query, 0, whole, q_length, k_length, scale, floor, SCORE, CAUSAL, False, WIDTH, BLOCK_D, BLOCK_M,
            BLOCK_N,
        )
        dq_re, dq_im = _query_gradient(
            dq_re, dq_im, q_re, q_im, minus_q_re, g_re, g_im, minus_g_re, k, v, k_s, v_s, row_lse, row_delta,
            query, whole, last, q_length, k_length, scale, floor, SCORE, CAUSAL, True, WIDTH, BLOCK_D,
            BLOCK_M, BLOCK_N,
        )
        dq += row * (2 * WIDTH)
        _store(dq, dq_re * scale, dq_im * scale, query, 2 * WIDTH, q_length, WIDTH, BLOCK_D)


@jit
def _key_gradient(
    dk_re, dk_im, dv_re, dv_im, k_re, k_im, minus_k_im, v_re, v_im, minus_v_im, q, grad, q_s, g_s, lse, delta,
    key, first, last, q_length, k_length, scale, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pass over queries ``first`` to ``last`` of one head: conj(ds) q and conj(w) g, on transposed scores."""
    for m in range(first, last, BLOCK_M):
        query = m + tl.arange(0, BLOCK_M)
        q_re, q_im = _load(q, query, q_s, q_length, WIDTH, BLOCK_D)
        g_re, g_im = _load(grad, query, g_s, q_length, WIDTH, BLOCK_D)
        # Queries that do not exist get the weight 2^-inf = 0.
        row_lse = tl.load(lse + query, mask=query < q_length, other=float("inf"))
        row_delta = tl.load(delta + query, mask=query < q_length, other=0.0)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        s_re = _two(k_re, tl.trans(q_re), k_im, tl.trans(q_im), zero)
        s_im = zero
        if SCORE != "real":
            s_im = _two(k_re, tl.trans(q_im), minus_k_im, tl.trans(q_re), zero)
        size = _size(s_re, s_im, floor, SCORE)
        p = tl.exp2((size - row_lse[None, :]) * (scale * LOG2_E))
        if MASKED:
            p = tl.where(_visible(query[None, :], key[:, None], q_length, k_length, CAUSAL), p, 0.0)
        c_re = _two(v_re, tl.trans(g_re), v_im, tl.trans(g_im), zero)
        c_im = zero
        if SCORE == "phase":
            c_im = _two(v_re, tl.trans(g_im), minus_v_im, tl.trans(g_re), zero)
            turned = p / size
            w_re = (turned * s_re).to(g_re.dtype)
            w_im = turned * s_im
            dv_re = _two(w_re, g_re, w_im.to(g_re.dtype), g_im, dv_re)
            dv_im = _two(w_re, g_im, (-w_im).to(g_re.dtype), g_re, dv_im)
        else:
            weight = p.to(g_re.dtype)
            dv_re = tl.dot(weight, g_re, dv_re, input_precision="ieee")
            dv_im = tl.dot(weight, g_im, dv_im, input_precision="ieee")
        ds_re, ds_im = _score_gradient(p, s_re, s_im, size, c_re, c_im, row_delta[None, :], scale, SCORE)
        w_re = ds_re.to(q_re.dtype)
        if SCORE == "real":
            dk_re = tl.dot(w_re, q_re, dk_re, input_precision="ieee")
            dk_im = tl.dot(w_re, q_im, dk_im, input_precision="ieee")
        else:
            dk_re = _two(w_re, q_re, ds_im.to(q_re.dtype), q_im, dk_re)
            dk_im = _two(w_re, q_im, (-ds_im).to(q_re.dtype), q_re, dk_im)
    return dk_re, dk_im, dv_re, dv_im


@_jit
def _key_gradient_kernel(
    q, k, v, grad, lse, delta, dk, dv, cu_seqlens, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s,
    kv_heads, group, q_length, k_length, longest, scale, floor, SCORE: tl.constexpr, CAUSAL: tl.constexpr,
    VARIABLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of a block of keys and values, summed in turn over the query heads that share them.

    Memory: k, v and their gradients once, q and the gradient of the output once a block of keys.
    """
    positions, key_positions = q_length, k_length
    block, batch, kv_head, start, q_length, k_length = _place(
        cu_seqlens, kv_heads, q_length, k_length, tl.cdiv(longest, BLOCK_N), VARIABLE
    )
    n = block * BLOCK_N
    if n < k_length:
        key = n + tl.arange(0, BLOCK_N)
        k += batch * k_b + kv_head * k_h + start * k_s
        v += batch * v_b + kv_head * v_h + start * v_s
        k_re, k_im = _load(k, key, k_s, k_length, WIDTH, BLOCK_D)
        v_re, v_im = _load(v, key, v_s, k_length, WIDTH, BLOCK_D)
        minus_k_im, minus_v_im = -k_im, -v_im
        dk_re = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dk_im = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_re = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_im = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        first = 0
        whole = 0
        if CAUSAL:
            shift = k_length - q_length
            first = tl.maximum(0, n - shift) // BLOCK_M * BLOCK_M
            whole = (tl.maximum(0, n + BLOCK_N - 1 - shift) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        if n + BLOCK_N > k_length:
            whole = q_length
        for member in range(group):
            head = kv_head * group + member
            head_q = q + batch * q_b + head * q_h + start * q_s
            head_grad = grad + batch * g_b + head * g_h + start * g_s
            row = (batch * (kv_heads * group) + head) * positions + start
            dk_re, dk_im, dv_re, dv_im = _key_gradient(
                dk_re, dk_im, dv_re, dv_im, k_re, k_im, minus_k_im, v_re, v_im, minus_v_im, head_q, head_grad,
                q_s, g_s, lse + row, delta + row, key, first, tl.minimum(whole, q_length), q_length, k_length,
                scale, floor, SCORE, CAUSAL, True, WIDTH, BLOCK_D, BLOCK_M, BLOCK_N,
            )
            dk_re, dk_im, dv_re, dv_im = _key_gradient(
                dk_re, dk_im, dv_re, dv_im, k_re, k_im, minus_k_im, v_re, v_im, minus_v_im, head_q, head_grad,
                q_s, g_s, lse + row, delta + row, key, whole, q_length, q_length, k_length, scale, floor,
                SCORE, CAUSAL, False, WIDTH, BLOCK_D, BLOCK_M, BLOCK_N,
            )
        row = (batch * kv_heads + kv_head) * key_positions + start
        dk += row * (2 * WIDTH)
        dv += row * (2 * WIDTH)
        _store(dk, dk_re * scale, dk_im * scale, key, 2 * WIDTH, k_length, WIDTH, BLOCK_D)
        _store(dv, dv_re, dv_im, key, 2 * WIDTH, k_length, WIDTH, BLOCK_D)


# fmt: on
def forward(q: Tensor, k: Tensor, v: Tensor, score: str, mask: Mask) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores, unscaled, float32 (B, H, S)."""
    q, k, v, mask = *map(_inner_contiguous, (q, k, v)), mask._replace(cu_seqlens=contiguous(mask.cu_seqlens))
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if mask.cu_seqlens is not None:
        _assert_bounds(q, mask.cu_seqlens, mask.max_seqlen)
    _launch(_forward_kernel, f"{score} forward", (q, k, v), (out, lse), score, mask)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, score: str, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    q, k, v, grad = map(_inner_contiguous, (q, k, v, grad))
    mask = mask._replace(cu_seqlens=contiguous(mask.cu_seqlens))
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strided, by_query, by_key = (q, k, v, grad), (out, lse, delta, grad_q), (lse, delta, grad_k, grad_v)
    _launch(_query_gradient_kernel, f"{score} query gradient", strided, by_query, score, mask)
    _launch(_key_gradient_kernel, f"{score} key gradient", strided, by_key, score, mask, by_keys=True)
    return grad_q, grad_k, grad_v


def _launch(
    kernel: Any,
    name: str,
    strided: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    score: str,
    mask: Mask,
    by_keys: bool = False,
) -> None:
    """Launch a kernel on tensors that come with their strides, q, k, v first, and on others, contiguous.

    Its programs hold blocks of queries, or of keys.
    """
    q, k, *_ = strided
    sequences, queries, keys = _extent(q, k, mask)
    heads, longest, block = (k.shape[1], keys, "BLOCK_N") if by_keys else (q.shape[1], queries, "BLOCK_M")
    scale = q.shape[-1] ** -0.5

    def run(options: Options) -> None:
        launch(
            kernel,
            (ceil_div(longest, options[block]) * sequences * heads,),
            *(*strided, *others, mask.cu_seqlens, *(n for x in strided for n in x.stride()[:3])),
            *(heads, q.shape[1] // k.shape[1], q.shape[2], k.shape[2], longest),
            *(scale, (modulus_floor(q.dtype) / scale) ** 2),
            SCORE=score,
            CAUSAL=mask.causal,
            VARIABLE=mask.cu_seqlens is not None,
            WIDTH=q.shape[-1],
            BLOCK_D=max(16, next_power_of_2(q.shape[-1])),
            **options,
        )

    # What decides about the time, beside the head size.
    deciding = (*q.shape[:3], *k.shape[1:3], mask.causal, mask.cu_seqlens is not None)
    run(PINNED.choose(name, q, q.shape[-1], run, *deciding))


def _inner_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides, but a token's planes must lie together."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


def _extent(q: Tensor, k: Tensor, mask: Mask) -> tuple[int, int, int]:
    """Sequences, and the largest numbers of queries and keys of one."""
    if mask.cu_seqlens is None:
        return q.shape[0], q.shape[2], k.shape[2]
    longest = q.shape[2] if mask.max_seqlen is None else min(mask.max_seqlen, q.shape[2])
    return mask.cu_seqlens.shape[0] - 1, longest, longest


def _assert_bounds(q: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> None:
    """What ``_parts`` checks, by the device: to read the boundaries here would wait for the GPU."""
    lengths = cu_seqlens.diff()
    covered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == q.shape[2]) & (lengths >= 0).all()
    torch._assert_async(covered, f"cu_seqlens must rise from 0 to the {q.shape[2]} packed tokens")
    if max_seqlen is not None:
        shorter = (lengths <= max_seqlen).all()
        torch._assert_async(shorter, f"max_seqlen={max_seqlen} is less than the longest packed sequence")


# The head size that leaves the fewest registers, by bits; the larger one of 32 bits spills in any variant.
TIGHT = {"16": 128, "32": 64}


def compile_cases() -> dict[str, Callable[[], object]]:
    """What to compile ahead of time: every kind of score, dtype size and pinned head size.

    For one head size also the variants that compile to something else.
    """
    cases: dict[str, Callable[[], object]] = {}
    for score in SCORES:
        for bits, widths in PINNED.table[f"{score} forward"]["sm_80"].items():
            dtype = {"16": torch.bfloat16, "32": torch.float32}[bits]
            for width in map(int, widths):
                label = f"{score} {bits} bits, d={width}"
                cases[label] = partial(_launch_all, score, dtype, width)
                if width == TIGHT[bits]:
                    cases[f"{label}, not causal"] = partial(_launch_all, score, dtype, width, causal=False)
                    cases[f"{label}, packed"] = partial(_launch_all, score, dtype, width, packed=True)
                    cases[f"{label}, uneven"] = partial(_launch_all, score, dtype, width - 3)
    return cases


def _launch_all(
    score: str, dtype: torch.dtype, width: int, causal: bool = True, packed: bool = False
) -> None:
    batch = 1 if packed else 2
    q = torch.empty(batch, 4, 1024, 2, width, dtype=dtype)
    k, v = torch.empty(2, batch, 2, 1024, 2, width, dtype=dtype)
    bounds = torch.empty(3, dtype=torch.int32) if packed else None
    mask = Mask(causal, bounds)
    out, lse = forward(q, k, v, score, mask)
    backward(q, q, k, v, out, lse, score, mask)
