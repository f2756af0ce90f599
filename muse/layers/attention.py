"""Multi-head self-attention on planar states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.complex_attention import complex_attention, windowed_attention
from kernels.complex_rotary import split_heads
from muse.layers.linear import ComplexLinear
from muse.layers.packing import Packing
from muse.layers.rotary import rotary_table


@dataclass
class KVCache:
    """Keys and values of the tokens that one layer has seen.

    Attributes:
        keys: turned by their positions, planar (B, H_kv, length, 2, d), of stage 0 (B, H_kv, length, d); None
            before the first token.
        values: as keys.
        forgotten: tokens before these that no window holds any more.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    forgotten: int = 0

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.forgotten + (0 if self.keys is None else self.keys.shape[2])

    def extend(self, keys: Tensor, values: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Add those of the tokens that follow, and return those of all that one of these may see."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        self.keys, self.values = keys, values
        if window is not None and (old := keys.shape[2] - window + 1) > 0:
            # No views, which would keep all.
            self.keys, self.values = keys[:, :, old:].clone(), values[:, :, old:].clone()
            self.forgotten += old
        return keys, values


class ComplexAttention(nn.Module):
    """Causal multi-head self-attention on planar states with rotary positions.

    Args:
        d_model: complex channels.
        heads: query heads.
        kv_heads: key and value heads; ``heads`` must be a multiple.
        score: ``real``, ``magnitude`` or ``phase``.
        init: initialisation of the projections.
        gain: factor on the initial output projection.
        window: tokens that one sees, itself and those before it; None for all.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        score: str = "real",
        init: str = "glorot",
        gain: float = 1.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = d_model // heads
        self.score = score
        channels = (self.heads + 2 * self.kv_heads) * self.head_dim
        # Queries, keys and values are one product, but initialised as maps of d_model channels each.
        apart = math.sqrt((d_model + channels) / (2 * d_model)) if init == "glorot" else 1.0
        self.projection = ComplexLinear(d_model, channels, bias=False, init=init, gain=apart)
        self.output = ComplexLinear(d_model, d_model, bias=False, init=init, gain=gain)

    def new_cache(self, longest: int) -> KVCache:
        """A cache without tokens, of which it may have any number."""
        return KVCache()

    def forward(
        self,
        z: Tensor,
        cache: KVCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Map planar (B, S, 2, D) to planar (B, S, 2, D).

        Args:
            z: states.
            cache: of the tokens before z, which those of z are added to. Decode without gradients.
            packing: of documents that do not see each other.

        Raises:
            ValueError: a cache, or a window, of packed documents.
        """
        if packing is not None:
            if cache is not None or self.window is not None:
                raise ValueError("packed documents have no cache and no window")
            return self._of_documents(z, packing)
        projection = self.projection(z).unflatten(-1, (-1, self.head_dim))
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + z.shape[1], device=z.device)
        table = rotary_table(positions, self.head_dim)
        q, k, v = split_heads(projection, table, self.heads, self.kv_heads)
        if cache is not None:
            k, v = cache.extend(k, v, self.window)
        if self.window is not None:
            out = windowed_attention(q, k, v, self.score, self.window)
        else:
            out = complex_attention(q, k, v, self.score)
        return self.output(_states_of(out))

    def _of_documents(self, z: Tensor, packing: Packing) -> Tensor:
        """The windows as one row, of which a token sees its own document alone."""
        projection = self.projection(z.flatten(0, 1)[None]).unflatten(-1, (-1, self.head_dim))
        table = rotary_table(packing.positions.flatten(), self.head_dim)
        q, k, v = split_heads(projection, table, self.heads, self.kv_heads)
        bounds = packing.cu_seqlens
        out = complex_attention(q, k, v, self.score, cu_seqlens=bounds, max_seqlen=z.shape[1])
        return self.output(_states_of(out)).view(z.shape)


def _states_of(heads: Tensor) -> Tensor:
    """Planar (B, H, S, 2, d) as planar (B, S, 2, H d)."""
    return heads.permute(0, 2, 3, 1, 4).flatten(-2)
