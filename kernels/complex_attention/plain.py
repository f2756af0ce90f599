"""Complex attention as one writes it down, every score held: what tests and benchmarks compare with.

``future`` are the keys (S, S_k) that a query does not see, if any; the other arguments are those of
``complex_attention``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.planar import modulus_floor, upcast


def future_keys(q: Tensor, k: Tensor) -> Tensor:
    """What a causal call does not see."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)


def native(q: Tensor, k: Tensor, v: Tensor, score: str, future: Tensor | None) -> Tensor:
    """The definition, on torch's complex tensors (B, H, S, d)."""
    k, v = _of_every_head(q, k, v)
    s = (q * q.shape[-1] ** -0.5) @ k.mH
    weight = _masked(s.real if score == "real" else s.abs(), future).softmax(-1)
    return (weight * s.sgn() if score == "phase" else weight.to(s.dtype)) @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, score: str, future: Tensor | None, floor: float | None = None
) -> Tensor:
    """On concatenated planes; moduli of half precision are computed in float32, above ``floor``."""
    k, v = _of_every_head(q, k, v)
    s_re, s_im, size = _scores(q, k, score, floor)
    return _weighted(_masked(size, future).softmax(-1), s_re, s_im, size, v, score)


def flash(q: Tensor, k: Tensor, v: Tensor, score: str, future: Tensor | None) -> Tensor:
    """As ``attention``, but rounding where flash attention does.

    Weights are divided by their sum at the end, so that the mean slope of the backward pass is taken of the
    output, and they come of scores that are computed again, so that rounding leaves their sum off 1.
    """
    k, v = _of_every_head(q, k, v)
    s_re, s_im, size = _scores(q, k, score)
    again = _masked(_scores(q, k, score)[-1], future)
    largest = again.detach().amax(-1, keepdim=True)
    weight, total = (_masked(size, future) - largest).exp(), (again - largest).exp().sum(-1, keepdim=True)
    return _weighted(weight, s_re, s_im, size, v, score) / total.to(v.dtype).unsqueeze(-2)


def _of_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _masked(logits: Tensor, future: Tensor | None) -> Tensor:
    return logits if future is None else logits.masked_fill(future, -math.inf)


def _scores(q: Tensor, k: Tensor, score: str, floor: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Re s, Im s, and |s| or what stands for it."""
    floor, d = modulus_floor(q.dtype) if floor is None else floor, q.shape[-1]
    q, k = q.flatten(-2) * d**-0.5, k.flatten(-2)
    s_re = q @ k.mT
    if score == "real":
        return s_re, s_re, s_re
    s_re, s_im = upcast(s_re), upcast(torch.cat((q[..., d:], -q[..., :d]), -1) @ k.mT)
    return s_re, s_im, (s_re.square() + s_im.square() + floor**2).sqrt()


def _weighted(weight: Tensor, s_re: Tensor, s_im: Tensor, size: Tensor, v: Tensor, score: str) -> Tensor:
    d, rows = v.shape[-1], v.flatten(-2)
    if score != "phase":
        return (weight.to(v.dtype) @ rows).unflatten(-1, (2, d))
    weight = weight / size
    along, across = (weight * s_re).to(v.dtype) @ rows, (weight * s_im).to(v.dtype) @ rows
    return torch.stack((along[..., :d] - across[..., d:], along[..., d:] + across[..., :d]), -2)
