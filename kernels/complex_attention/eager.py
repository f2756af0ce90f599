"""Complex attention in PyTorch: by SDPA, with all scores held, and by blocks of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.planar import modulus_floor, upcast
from kernels.products import matmul

SCORES = ("real", "magnitude", "phase")


class Mask(NamedTuple):
    """Which keys a query sees, see ``complex_attention``."""

    causal: bool
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
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


def held(q: Tensor, k: Tensor, v: Tensor, score: str, hidden: Tensor | None) -> Tensor:
    """Attention that keeps its scores, by plain autograd.

    ``hidden`` are the keys that a query does not see, if any, of a shape that becomes (B, H_kv, H / H_kv, S,
    S_k); the other arguments are those of ``complex_attention``.
    """
    queries, heads = q.shape[2], k.shape[1]
    group = (q.shape[1] // heads, queries)
    rows = (q * q.shape[-1] ** -0.5).flatten(-2).unflatten(1, (heads, group[0])).flatten(2, 3)
    flat_k, flat_v = k.flatten(-2), v.flatten(-2)
    s_re = matmul(rows, flat_k.mT)
    size = s_re
    if score != "real":
        s_re, s_im = upcast(s_re), upcast(matmul(_minus_i(rows), flat_k.mT))
        size = (s_re.square() + s_im.square() + modulus_floor(q.dtype) ** 2).sqrt()
    logits = size
    if hidden is not None:
        logits = size.unflatten(2, group).masked_fill(hidden, -math.inf).flatten(2, 3)
    weight = logits.softmax(-1)
    if score == "phase":
        weight = weight / size
        real, imag = (matmul((weight * s).to(v.dtype), flat_v) for s in (s_re, s_im))
        # i times the part of Im s.
        re, im = imag.chunk(2, dim=-1)
        out = real + torch.cat((-im, re), dim=-1)
    else:
        out = matmul(weight.to(v.dtype), flat_v)
    return out.unflatten(2, group).flatten(1, 2).unflatten(-1, v.shape[-2:])


def future_keys(q: Tensor, k: Tensor) -> Tensor:
    """What a causal call does not see, (S, S_k)."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu_(1 + keys - queries)


def windowed(q: Tensor, k: Tensor, v: Tensor, score: str, window: int) -> Tensor:
    """Causal attention to the ``window`` nearest keys, by blocks of as many queries."""
    batch, _, queries = q.shape[:3]
    before, count = k.shape[2] - queries, -(-queries // window)
    # Of each block the keys at the same places, and as many before.
    room = (0, 0, 0, 0, window - before, count * window - queries)
    k, v = (
        F.pad(x, room).unfold(2, 2 * window, window).movedim(2, 0).movedim(-1, 3).flatten(0, 1)
        for x in (k, v)
    )
    q = F.pad(q, (0, 0, 0, 0, 0, count * window - queries))
    q = q.unflatten(2, (count, window)).movedim(2, 0).flatten(0, 1)
    place = torch.arange(2 * window, device=q.device)
    own = place[window:, None]
    seen = (place <= own) & (place > own - window)
    # The first block has no more keys than that before it.
    there = torch.arange(count, device=q.device)[:, None] * window + place >= window - before
    hidden = ~(seen & there[:, None]).repeat_interleave(batch, 0)[:, None, None]
    out = held(q, k, v, score, hidden).unflatten(0, (count, batch))
    return out.movedim(0, 2).flatten(2, 3)[:, :, :queries]


# Scores held at a time, and queries a block: few see fewer keys if causal, many make larger products.
BLOCK_SCORES = 1 << 21
BLOCK_QUERIES = (64, 256)


def forward(q: Tensor, k: Tensor, v: Tensor, score: str, mask: Mask) -> Tensor:
    """Attention by blocks of queries."""
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    for part in _parts(q, mask):
        for queries, keys in _blocks(q[:, :, part], k[:, :, part], mask.causal):
            rows = _grouped_rows(q[:, :, part], k, queries).mul_(q.shape[-1] ** -0.5)
            flat_k, flat_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (k, v))
            s_re, s_im, size = _scores(rows, flat_k, score, mask.causal, queries)
            weight = size.softmax(-1)
            if score == "phase":
                weight.div_(size)
                result = matmul((weight * s_re).to(v.dtype), flat_v)
                _add_i(result, matmul((weight * s_im).to(v.dtype), flat_v))
            else:
                result = matmul(weight.to(v.dtype), flat_v)
            _put(result, out[:, :, part], queries)
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, score: str, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    scale = q.shape[-1] ** -0.5
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Sums over the blocks of queries.
    grad_k, grad_v = (upcast(x).new_zeros(x.shape) for x in (k, v))
    for part in _parts(q, mask):
        for queries, keys in _blocks(q[:, :, part], k[:, :, part], mask.causal):
            rows = _grouped_rows(q[:, :, part], k, queries).mul_(scale)
            grad_rows = _grouped_rows(grad[:, :, part], k, queries).to(v.dtype)
            flat_k, flat_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (k, v))
            to_k, to_v = (x[:, :, part][:, :, keys].flatten(-2) for x in (grad_k, grad_v))
            s_re, s_im, size = _scores(rows, flat_k, score, mask.causal, queries)
            weight = size.softmax(-1)
            c_re = matmul(grad_rows, flat_v.mT)
            if score == "real":
                ds_re = torch.ops.aten._softmax_backward_data(c_re, weight, -1, weight.dtype)
                to_v += matmul(weight.mT, grad_rows)
                to_k += matmul(ds_re.mT, rows)
                _put(matmul(ds_re, flat_k).mul_(scale), grad_q[:, :, part], queries)
                continue
            c_re = upcast(c_re)
            if score == "magnitude":
                to_v += matmul(weight.to(v.dtype).mT, grad_rows)
                slope = torch.ops.aten._softmax_backward_data(c_re, weight, -1, weight.dtype).div_(size)
                ds_re, ds_im = s_re.mul_(slope), s_im.mul_(slope)
            else:
                turned = _minus_i(grad_rows)
                c_im = upcast(matmul(turned, flat_v.mT))
                s_re.div_(size)
                s_im.div_(size)
                to_v += matmul((weight * s_re).to(v.dtype).mT, grad_rows)
                to_v += matmul((weight * s_im).to(v.dtype).mT, turned)
                along = (c_re * s_re).addcmul_(c_im, s_im)
                slope = torch.ops.aten._softmax_backward_data(along, weight, -1, weight.dtype)
                weight.div_(size)
                slope.sub_(along.mul_(weight))
                ds_re = s_re.mul_(slope).addcmul_(c_re, weight)
                ds_im = s_im.mul_(slope).addcmul_(c_im, weight)
            ds_re, ds_im = ds_re.to(k.dtype), ds_im.to(k.dtype)
            to_k += matmul(ds_re.mT, rows)
            to_k += matmul(ds_im.mT, _minus_i(rows))
            result = matmul(ds_re, flat_k)
            _add_i(result, matmul(ds_im, flat_k))
            _put(result.mul_(scale), grad_q[:, :, part], queries)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _parts(q: Tensor, mask: Mask) -> list[slice]:
    """The sequences packed along the positions."""
    if mask.cu_seqlens is None:
        return [slice(None)]
    bounds = mask.cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the {q.shape[2]} packed tokens, not {bounds}")
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    longest = max(part.stop - part.start for part in parts)
    if mask.max_seqlen is not None and longest > mask.max_seqlen:
        raise ValueError(f"max_seqlen={mask.max_seqlen} is too small; a packed sequence has {longest} tokens")
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
    s_re = matmul(rows, k.mT)
    if score == "real":
        s_im = size = s_re
    else:
        s_re, s_im = upcast(s_re), upcast(matmul(_minus_i(rows), k.mT))
        size = s_re.square().addcmul_(s_im, s_im).add_(modulus_floor(rows.dtype) ** 2).sqrt_()
    if causal:
        count = queries.stop - queries.start
        future = torch.ones(count, count, dtype=torch.bool, device=k.device).triu_(1)
        square = size[..., size.shape[-1] - count :]
        square.unflatten(2, (-1, count)).masked_fill_(future, -math.inf)
    return s_re, s_im, size
