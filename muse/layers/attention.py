"""Complex attention: s = q conj(k) / sqrt(d), three kinds of score."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.layers.linear import ComplexLinear
from muse.layers.rotary import rotary_table, turn_into
from muse.planar import modulus_floor, upcast


def complex_attention(q: Tensor, k: Tensor, v: Tensor, score: str = "real", causal: bool = True) -> Tensor:
    """Attention of planar heads.

    ``real``: softmax(Re s) v, which equals SDPA on concatenated planes with scale 1/sqrt(d) and is
    dispatched to it. ``magnitude``: softmax(|s|) v. ``phase``: (softmax(|s|) * s/|s|) v, the product with
    v being complex. The last two hold the (S, S) scores.

    Args:
        q: planar (B, H, S, 2, d).
        k: planar (B, H_kv, S, 2, d), H a multiple of H_kv.
        v: planar, as k.
        score: ``real``, ``magnitude`` or ``phase``.
        causal: whether token n sees tokens 0 to n only.

    Returns:
        Planar (B, H, S, 2, d) in the dtype of v.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if score == "real":
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q.flatten(-2), k.flatten(-2), v.flatten(-2), is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out.unflatten(-1, v.shape[-2:])
    if score not in ("magnitude", "phase"):
        raise ValueError(f"score={score} is not known; choose real, magnitude or phase")
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q_re, q_im = q.unbind(-2)
    # Re s = q . k on concatenated planes; Im s = q . (i k).
    turned = torch.cat((-k[..., 1, :], k[..., 0, :]), dim=-1)
    # Scaled before the product, so that large scores do not overflow float16.
    flat_q = torch.cat((q_re, q_im), dim=-1) * scale
    s_re = upcast(flat_q @ k.flatten(-2).mT)
    s_im = upcast(flat_q @ turned.mT)
    size = (s_re.square() + s_im.square() + modulus_floor(q.dtype) ** 2).sqrt()
    if causal:
        future = torch.ones(size.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weight = size.masked_fill(future, -math.inf).softmax(-1)
    else:
        weight = size.softmax(-1)
    if score == "magnitude":
        return (weight.to(v.dtype) @ v.flatten(-2)).unflatten(-1, v.shape[-2:])
    turn = weight / size
    w_re, w_im = (turn * s_re).to(v.dtype), (turn * s_im).to(v.dtype)
    on_re, on_im = (w_re @ v.flatten(-2)), (w_im @ v.flatten(-2))
    width = v.shape[-1]
    return torch.stack(
        (on_re[..., :width] - on_im[..., width:], on_re[..., width:] + on_im[..., :width]), dim=-2
    )


class _SplitHeads(torch.autograd.Function):
    """Queries and keys turned by their positions, and values, from one projection.

    Forward and backward write each result once, in the layout in which the next product reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, projection: Tensor, table: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        ctx.counts = (heads, kv_heads, kv_heads)
        cos, sin = table.unbind(-2)
        q, k, v = projection.permute(0, 3, 1, 2, 4).split(ctx.counts, dim=1)
        turned_q, turned_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        turn_into(turned_q, q, cos, sin)
        turn_into(turned_k, k, cos, sin)
        return turned_q, turned_k, v.contiguous()

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        cos, sin = table.unbind(-2)
        batch, _, length, planes, width = grad_q.shape
        grad = grad_q.new_empty(batch, length, planes, sum(ctx.counts), width)
        q, k, v = grad.permute(0, 3, 1, 2, 4).split(ctx.counts, dim=1)
        turn_into(q, grad_q, cos, -sin)
        turn_into(k, grad_k, cos, -sin)
        v.copy_(grad_v)
        return grad, None, None, None


class ComplexAttention(nn.Module):
    """Causal multi-head self-attention on planar states with rotary positions.

    Args:
        d_model: complex channels.
        heads: query heads.
        kv_heads: key and value heads; ``heads`` must be a multiple.
        score: ``real``, ``magnitude`` or ``phase``.
        init: initialisation of the projections.
        gain: factor on the initial output projection.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        score: str = "real",
        init: str = "glorot",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = d_model // heads
        self.score = score
        channels = (self.heads + 2 * self.kv_heads) * self.head_dim
        # Queries, keys and values are one product, but initialised as maps of d_model channels each.
        apart = math.sqrt((d_model + channels) / (2 * d_model)) if init == "glorot" else 1.0
        self.projection = ComplexLinear(d_model, channels, bias=False, init=init, gain=apart)
        self.output = ComplexLinear(d_model, d_model, bias=False, init=init, gain=gain)

    def forward(self, z: Tensor) -> Tensor:
        """Map planar (B, S, 2, D) to planar (B, S, 2, D)."""
        projection = self.projection(z).unflatten(-1, (-1, self.head_dim))
        table = rotary_table(torch.arange(z.shape[1], device=z.device), self.head_dim)
        q, k, v = _SplitHeads.apply(projection, table, self.heads, self.kv_heads)
        out = complex_attention(q, k, v, self.score)
        return self.output(out.permute(0, 2, 3, 1, 4).flatten(-2))
