"""Multi-head self-attention on planar states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.complex_attention import complex_attention
from kernels.complex_pointwise import split_heads
from muse.layers.linear import ComplexLinear
from muse.layers.rotary import rotary_table


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
        q, k, v = split_heads(projection, table, self.heads, self.kv_heads)
        out = complex_attention(q, k, v, self.score)
        return self.output(out.permute(0, 2, 3, 1, 4).flatten(-2))
