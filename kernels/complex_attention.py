"""Complex attention with s = q conj(k) / sqrt(d), in three kinds of score, never holding the scores.

``real``: softmax(Re s) v. ``magnitude``: softmax(|s|) v. ``phase``: (softmax(|s|) * s/|s|) v, a complex
product. The running maximum and the sum of exponentials are those of flash attention (Dao et al.,
FlashAttention, 2022), taken of |s|; the phase is applied after the exponential. |s| is sqrt(Re s^2 + Im s^2 +
floor^2), so that its gradient is finite at s = 0 and the phase of 0 counts as 0.

The backward pass computes the scores again. With c = g conj(v) for the gradient g of the output, u = s/|s|, p
the weights and delta = sum p Re(conj(u) c) = Re(g conj(out)):

    magnitude   ds = p (Re c - delta) u
    phase       ds = p (Re(conj(u) c) - delta) u + p / |s| (c - u Re(conj(u) c))

and dq = ds k / sqrt(d), dk = conj(ds) q / sqrt(d), dv = conj(w) g with the weights w = p or p u.

Products of a causal call over half of the keys, FLOPs a pair of query and key: forward 4 * 2d (real), 6 * 2d
(magnitude), 8 * 2d (phase); backward, where the gradients of queries and of
keys each compute the scores again, 14 * 2d (real), 22 * 2d (magnitude), 28 * 2d (phase).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import (
    Options,
    ceil_div,
    fastest,
    launch,
    next_power_of_2,
    pinned_beside,
    target_name,
    tuning,
    use_triton,
)
from kernels.operator import operator
from kernels.planar import modulus_floor, upcast
from kernels.triton_import import jit, jit_unspecialised, tl

SCORES = ("real", "magnitude", "phase")
PINNED = pinned_beside(__file__)


def complex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str = "real",
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention of planar heads.

    Args:
        q: planar (B, H, S, 2, d), float32, bfloat16 or float16; float64 in the eager implementation.
        k: planar (B, H_kv, S_k, 2, d), H a multiple of H_kv.
        v: planar, as k.
        score: ``real``, ``magnitude`` or ``phase``.
        causal: whether query n sees keys 0 to n + S_k - S only: the last query sees every key, as it must
            with keys of earlier calls in a cache.
        cu_seqlens: int32 (n + 1,), the boundaries 0, ..., S of sequences packed into a batch of one;
            a query sees the keys of its own sequence only.
        max_seqlen: an upper bound of the packed lengths, by default S; it spares the kernel empty programs.

    ``real`` goes to torch's SDPA on a CPU, and on a GPU where the table beside this file says that it is
    faster or where heads are wider than the kernels take. In the backward pass of SDPA's flash kernel, and of
    its memory-efficient one, programs that hold different keys add to the gradient of a query by atomics in
    whatever order they finish, so repeated gradients differ in their last bits. All kernels here sum in one
    order; under ``torch.use_deterministic_algorithms`` they make ``real``, too.

    Returns:
        Planar (B, H, S, 2, d), in the dtype of q, k and v.

    Raises:
        TypeError: the dtypes differ, or that of cu_seqlens is not int32.
        ValueError: the score is unknown, the shapes do not belong together, or the boundaries are wrong. On a
            GPU wrong numbers in cu_seqlens are an assertion of the device instead, a RuntimeError of the next
            synchronisation.
    """
    _check(q, k, v, score, causal, cu_seqlens)
    if score == "real" and cu_seqlens is None and _takes_sdpa(q, k, v, causal):
        return _sdpa(q, k, v, causal)
    if cu_seqlens is None and k.shape[2] <= HELD_KEYS and not use_triton(q):
        return _held(q, k, v, score, causal)
    out, _ = complex_attention_forward(q, k, v, score, causal, cu_seqlens, max_seqlen)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool, cu_seqlens: Tensor | None) -> None:
    if score not in SCORES:
        raise ValueError(f"score={score} is not known; choose {', '.join(SCORES)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"queries, keys and values of one dtype are needed, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.ndim != 5 or k.shape != v.shape or (q.shape[0], *q.shape[3:]) != (k.shape[0], *k.shape[3:]):
        raise ValueError(
            "planar queries (B, H, S, 2, d) and keys and values (B, H_kv, S_k, 2, d) are needed, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key and value heads")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"causal attention of {q.shape[2]} queries needs as many keys, not {k.shape[2]}")
    if cu_seqlens is None:
        return
    if q.shape[0] != 1 or k.shape[2] != q.shape[2]:
        raise ValueError("packed sequences need a batch of one and as many keys as queries")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be (n + 1,) on {q.device}, not {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )


def _takes_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether ``real`` goes to SDPA.

    On a GPU that is pinned by architecture, and measured with MUSE_TUNE_KERNELS=1. Heads that are too wide
    for the kernels always do. Otherwise gradients must not differ from call to call in torch's deterministic
    mode, and the shift of a causal call with cached keys would take a mask of all queries and keys.
    On a CPU float32 does, and bfloat16 does not, because SDPA computes its products in float32 there.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not use_triton(q):
        return not deterministic if q.is_cuda else q.dtype != torch.bfloat16
    if not PINNED.covers("real forward", q, q.shape[-1]):
        return True
    if deterministic or (causal and 1 < q.shape[2] < k.shape[2]):
        return False
    if not tuning(q):
        return bool(PINNED.table["dispatch"][target_name(q)][str(8 * q.element_size())]["real"] == "sdpa")
    leaves = [torch.randn_like(x, requires_grad=True) for x in (q, k, v)]
    grad = torch.randn_like(q)

    def train(attention: Callable[..., Any]) -> None:
        with torch.enable_grad():
            torch.autograd.grad(attention(*leaves), leaves, grad)

    key = ("complex_attention real", *q.shape, *k.shape[1:3], q.dtype, causal)
    candidates = {
        "sdpa": lambda: train(lambda q, k, v: _sdpa(q, k, v, causal)),
        "triton": lambda: train(lambda q, k, v: complex_attention_forward(q, k, v, "real", causal)[0]),
    }
    return fastest(key, candidates) == "sdpa"


# --- Eager -----------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The score kind ``real`` as torch's attention of head dimension 2d on concatenated planes."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q.flatten(-2),
        k.flatten(-2),
        v.flatten(-2),
        attn_mask=mask,
        is_causal=causal and queries == keys,
        scale=q.shape[-1] ** -0.5,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unflatten(-1, v.shape[-2:])


# So few keys are cheaper to hold all scores of than to compute these again in the backward pass.
HELD_KEYS = 256


def _held(q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool) -> Tensor:
    """Attention that keeps its scores, by plain autograd."""
    queries, heads = q.shape[2], k.shape[1]
    group = (q.shape[1] // heads, queries)
    rows = (q * q.shape[-1] ** -0.5).flatten(-2).unflatten(1, (heads, group[0])).flatten(2, 3)
    flat_k, flat_v = k.flatten(-2), v.flatten(-2)
    s_re = rows @ flat_k.mT
    size = s_re
    if score != "real":
        s_re, s_im = upcast(s_re), upcast(_minus_i(rows) @ flat_k.mT)
        size = (s_re.square() + s_im.square() + modulus_floor(q.dtype) ** 2).sqrt()
    logits = size
    if causal:
        future = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device)
        future = future.triu_(1 + k.shape[2] - queries)
        logits = size.unflatten(2, group).masked_fill(future, -math.inf).flatten(2, 3)
    weight = logits.softmax(-1)
    if score == "phase":
        weight = weight / size
        real, imag = (weight * s_re).to(v.dtype) @ flat_v, (weight * s_im).to(v.dtype) @ flat_v
        # i times the part of Im s.
        re, im = imag.chunk(2, dim=-1)
        out = real + torch.cat((-im, re), dim=-1)
    else:
        out = weight.to(v.dtype) @ flat_v
    return out.unflatten(2, group).flatten(1, 2).unflatten(-1, v.shape[-2:])


# Scores held at a time, and queries a block: few see fewer keys if causal, many make larger products.
BLOCK_SCORES = 1 << 21
BLOCK_QUERIES = (64, 256)


def _forward_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    for part in _parts(q, cu_seqlens, max_seqlen):
        for queries, keys in _blocks(q[:, :, part], k[:, :, part], causal):
            rows = _grouped_rows(q[:, :, part], k, queries).mul_(q.shape[-1] ** -0.5)
            flat_k, flat_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (k, v))
            s_re, s_im, size = _scores(rows, flat_k, score, causal, queries)
            weight = size.softmax(-1)
            if score == "phase":
                weight.div_(size)
                result = (weight * s_re).to(v.dtype) @ flat_v
                _add_i(result, (weight * s_im).to(v.dtype) @ flat_v)
            else:
                result = weight.to(v.dtype) @ flat_v
            _put(result, out[:, :, part], queries)
    return out


def _backward_eager(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Sums over the blocks of queries.
    grad_k, grad_v = (upcast(x).new_zeros(x.shape) for x in (k, v))
    for part in _parts(q, cu_seqlens):
        for queries, keys in _blocks(q[:, :, part], k[:, :, part], causal):
            rows = _grouped_rows(q[:, :, part], k, queries).mul_(scale)
            grad_rows = _grouped_rows(grad[:, :, part], k, queries).to(v.dtype)
            flat_k, flat_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (k, v))
            to_k, to_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (grad_k, grad_v))
            s_re, s_im, size = _scores(rows, flat_k, score, causal, queries)
            weight = size.softmax(-1)
            c_re = grad_rows @ flat_v.mT
            if score == "real":
                ds_re = torch.ops.aten._softmax_backward_data(c_re, weight, -1, weight.dtype)
                to_v += weight.mT @ grad_rows
                to_k += ds_re.mT @ rows
                _put((ds_re @ flat_k).mul_(scale), grad_q[:, :, part], queries)
                continue
            c_re = upcast(c_re)
            if score == "magnitude":
                to_v += weight.to(v.dtype).mT @ grad_rows
                slope = torch.ops.aten._softmax_backward_data(c_re, weight, -1, weight.dtype).div_(size)
                ds_re, ds_im = s_re.mul_(slope), s_im.mul_(slope)
            else:
                turned = _minus_i(grad_rows)
                c_im = upcast(turned @ flat_v.mT)
                s_re.div_(size)
                s_im.div_(size)
                to_v += (weight * s_re).to(v.dtype).mT @ grad_rows
                to_v += (weight * s_im).to(v.dtype).mT @ turned
                along = (c_re * s_re).addcmul_(c_im, s_im)
                slope = torch.ops.aten._softmax_backward_data(along, weight, -1, weight.dtype)
                weight.div_(size)
                slope.sub_(along.mul_(weight))
                ds_re = s_re.mul_(slope).addcmul_(c_re, weight)
                ds_im = s_im.mul_(slope).addcmul_(c_im, weight)
            ds_re, ds_im = ds_re.to(k.dtype), ds_im.to(k.dtype)
            to_k += ds_re.mT @ rows
            to_k += ds_im.mT @ _minus_i(rows)
            result = ds_re @ flat_k
            _add_i(result, ds_im @ flat_k)
            _put(result.mul_(scale), grad_q[:, :, part], queries)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _parts(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None = None) -> list[slice]:
    """The sequences packed along the positions."""
    if cu_seqlens is None:
        return [slice(None)]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the {q.shape[2]} packed tokens, not {bounds}")
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    longest = max(part.stop - part.start for part in parts)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen} is too small; a packed sequence has {longest} tokens")
    return parts


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that each sees."""
    batch, heads, count = q.shape[:3]
    step = BLOCK_SCORES // max(1, batch * heads * k.shape[2])
    step = min(max(step, BLOCK_QUERIES[0]), BLOCK_QUERIES[1])
    for first in range(0, count, step):
        last = min(first + step, count)
        yield slice(first, last), slice(0, last + k.shape[2] - count if causal else k.shape[2])


def _grouped_rows(x: Tensor, k: Tensor, queries: slice) -> Tensor:
    """A copy of some positions as (B, H_kv, rows, 2d): heads that share keys are rows of one matrix."""
    block = x[:, :, queries].clone(memory_format=torch.contiguous_format)
    batch, heads, length, _, channels = block.shape
    return block.view(batch, k.shape[1], heads // k.shape[1] * length, 2 * channels)


def _put(rows: Tensor, x: Tensor, queries: slice) -> None:
    block = x[:, :, queries]
    block.copy_(rows.view(block.shape))


def _minus_i(rows: Tensor) -> Tensor:
    """-i z = [im | -re] of z = [re | im]."""
    re, im = rows.chunk(2, dim=-1)
    return torch.cat((im, -re), dim=-1)


def _add_i(rows: Tensor, other: Tensor) -> None:
    """Add i times ``other`` in place."""
    re, im = other.chunk(2, dim=-1)
    width = re.shape[-1]
    rows[..., :width].sub_(im)
    rows[..., width:].add_(re)


def _scores(
    rows: Tensor, k: Tensor, score: str, causal: bool, queries: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Re s, Im s and the logits, Re s or |s|, which are -inf where a key is in the future."""
    s_re = rows @ k.mT
    if score == "real":
        s_im = size = s_re
    else:
        s_re, s_im = upcast(s_re), upcast(_minus_i(rows) @ k.mT)
        size = s_re.square().addcmul_(s_im, s_im).add_(modulus_floor(rows.dtype) ** 2).sqrt_()
    if causal:
        count = queries.stop - queries.start
        future = torch.ones(count, count, dtype=torch.bool, device=k.device).triu_(1)
        square = size[..., size.shape[-1] - count :]
        square.unflatten(2, (-1, count)).masked_fill_(future, -math.inf)
    return s_re, s_im, size


# --- Triton ----------------------------------------------------------------------------------------------
#
# A program holds a block of queries (or of keys) and passes over the other side, as in FlashAttention-2
# (Dao, 2023). The planes are separate tiles, so that a complex product is four real ones on tiles that were
# loaded once. Scores stay unscaled; ``floor`` is the square of the floor of |s| in these units.
# Exponentials are powers of two. The pointers of q, k, v and the gradient of the output come with their
# strides along batch, heads and positions; what the wrappers allocate is contiguous, (batch, heads,
# positions, 2, d).
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
def _forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        _assert_bounds(q, cu_seqlens, max_seqlen)
    sequences, longest, _ = _extent(q, k, cu_seqlens, max_seqlen)

    def run(options: Options) -> None:
        launch(
            _forward_kernel,
            (ceil_div(longest, options["BLOCK_M"]) * sequences * q.shape[1],),
            *(q, k, v, out, lse, cu_seqlens, *_strides(q, k, v)),
            *(q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], longest, *_scale_and_floor(q)),
            **_constants(q, score, causal, cu_seqlens),
            **options,
        )

    run(PINNED.choose(f"{score} forward", q, q.shape[-1], run, *_deciding(q, k, causal, cu_seqlens)))
    return out, lse


def _backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (_inner_contiguous(x) for x in (q, k, v, grad))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    sequences, q_longest, k_longest = _extent(q, k, cu_seqlens, max_seqlen)
    group = q.shape[1] // k.shape[1]
    constants = _constants(q, score, causal, cu_seqlens)

    def run_queries(options: Options) -> None:
        launch(
            _query_gradient_kernel,
            (ceil_div(q_longest, options["BLOCK_M"]) * sequences * q.shape[1],),
            *(q, k, v, grad, out, lse, delta, dq, cu_seqlens, *_strides(q, k, v, grad)),
            *(q.shape[1], group, q.shape[2], k.shape[2], q_longest, *_scale_and_floor(q)),
            **constants,
            **options,
        )

    def run_keys(options: Options) -> None:
        launch(
            _key_gradient_kernel,
            (ceil_div(k_longest, options["BLOCK_N"]) * sequences * k.shape[1],),
            *(q, k, v, grad, lse, delta, dk, dv, cu_seqlens, *_strides(q, k, v, grad)),
            *(k.shape[1], group, q.shape[2], k.shape[2], k_longest, *_scale_and_floor(q)),
            **constants,
            **options,
        )

    deciding = _deciding(q, k, causal, cu_seqlens)
    run_queries(PINNED.choose(f"{score} query gradient", q, q.shape[-1], run_queries, *deciding))
    run_keys(PINNED.choose(f"{score} key gradient", q, q.shape[-1], run_keys, *deciding))
    return dq, dk, dv


def _inner_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides, but a token's planes must lie together."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


def _extent(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int, int]:
    """Sequences, and the largest numbers of queries and keys of one."""
    if cu_seqlens is None:
        return q.shape[0], q.shape[2], k.shape[2]
    longest = q.shape[2] if max_seqlen is None else min(max_seqlen, q.shape[2])
    return cu_seqlens.shape[0] - 1, longest, longest


def _assert_bounds(q: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> None:
    """What ``_parts`` checks, by the device: to read the boundaries here would wait for the GPU."""
    lengths = cu_seqlens.diff()
    covered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == q.shape[2]) & (lengths >= 0).all()
    torch._assert_async(covered, f"cu_seqlens must rise from 0 to the {q.shape[2]} packed tokens")
    if max_seqlen is not None:
        shorter = (lengths <= max_seqlen).all()
        torch._assert_async(shorter, f"max_seqlen={max_seqlen} is less than the longest packed sequence")


def _deciding(q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None) -> tuple[object, ...]:
    """What decides about the time of a kernel, beside the head size."""
    return (*q.shape[:3], *k.shape[1:3], causal, cu_seqlens is not None)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _scale_and_floor(q: Tensor) -> tuple[float, float]:
    scale = q.shape[-1] ** -0.5
    return scale, (modulus_floor(q.dtype) / scale) ** 2


def _constants(q: Tensor, score: str, causal: bool, cu_seqlens: Tensor | None) -> dict[str, object]:
    width = q.shape[-1]
    return {
        "SCORE": score,
        "CAUSAL": causal,
        "VARIABLE": cu_seqlens is not None,
        "WIDTH": width,
        "BLOCK_D": max(16, next_power_of_2(width)),
    }


# --- Operations ------------------------------------------------------------------------------------------


@operator
def complex_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and what the Triton kernels keep of the softmax, float32 (B, H, S); nothing in eager."""
    if use_triton(q):
        return _forward_triton(q, k, v, score, causal, cu_seqlens, max_seqlen)
    out = _forward_eager(q, k, v, score, causal, cu_seqlens, max_seqlen)
    return out, q.new_empty(0, dtype=torch.float32)


@complex_attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    kept = q.shape[:3] if use_triton(q) else (0,)
    return q.new_empty(q.shape, dtype=v.dtype), q.new_empty(kept, dtype=torch.float32)


@operator
def complex_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    if out is not None:
        return _backward_triton(grad, q, k, v, out, lse, score, causal, cu_seqlens, max_seqlen)
    return _backward_eager(grad, q, k, v, score, causal, cu_seqlens)


@complex_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    score: str,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.score, ctx.causal, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    # The eager backward pass does without the output.
    ctx.save_for_backward(q, k, v, out if use_triton(q) else None, lse, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *kept, cu_seqlens = ctx.saved_tensors
    grads = complex_attention_backward(grad, *kept, ctx.score, ctx.causal, cu_seqlens, ctx.max_seqlen)
    return (*grads, None, None, None, None)


complex_attention_forward.register_autograd(_gradients, setup_context=_keep)


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
    out, lse = _forward_triton(q, k, v, score, causal, bounds, None)
    _backward_triton(q, q, k, v, out, lse, score, causal, bounds, None)
