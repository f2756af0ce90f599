"""Stage 0: a modern real decoder, the baseline of every comparison."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.layers import KVCache
from muse.layers.packing import Packing
from muse.layers.rotary import rotary_table, rotate_pairs
from muse.models.block import Block
from muse.models.language_model import LanguageModel

# The logit that a tied model gives its own input token at the start: rows have this norm per channel.
TIED_LOGIT = 2.0


class RealEmbedding(nn.Module):
    """Token embedding (V, d) with rms ``rms``, multiplied by 1/rms on the way in (see ComplexEmbedding)."""

    def __init__(self, vocab_size: int, features: int, rms: float) -> None:
        super().__init__()
        self.rms = rms
        self.weight = nn.Parameter(torch.empty(vocab_size, features).normal_(std=rms))

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Map tokens (B, S) to (B, S, d); positions, from ``start`` on, are a matter of attention."""
        return F.embedding(tokens, self.weight) * (1 / self.rms)


class RealAttention(nn.Module):
    """Causal multi-head self-attention with rotary positions, through SDPA."""

    def __init__(self, width: WidthConfig, gain: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = width.heads, width.kv_heads
        self.head_dim = width.d_model // width.heads
        channels = (self.heads + 2 * self.kv_heads) * self.head_dim
        # Queries, keys and values are one product, but initialised as maps of d_model channels each.
        apart = math.sqrt((width.d_model + channels) / (2 * width.d_model))
        self.projection = _linear(width.d_model, channels, apart)
        self.output = _linear(width.d_model, width.d_model, gain)

    def new_cache(self, longest: int) -> KVCache:
        """A cache without tokens, of which it may have any number."""
        return KVCache()

    def forward(self, x: Tensor, cache: KVCache | None = None, packing: Packing | None = None) -> Tensor:
        """Map (B, S, d) to (B, S, d).

        Args:
            x: states.
            cache: of the tokens before x, which those of x are added to.
            packing: of documents that do not see each other, without a cache.

        Raises:
            ValueError: a cache of packed documents.
        """
        if packing is not None:
            if cache is not None:
                raise ValueError("packed documents have no cache")
            return self._of_documents(x, packing)
        heads = self.projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        table = rotary_table(positions, self.head_dim // 2)
        q, k, v = rotate_pairs(q, table), rotate_pairs(k, table), v.contiguous()
        mask = None
        if cache is not None:
            k, v = cache.extend(k, v)
            # SDPA's own causal mask begins at the first key.
            if start:
                mask = torch.arange(k.shape[2], device=x.device) <= positions[:, None]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(out.transpose(1, 2).flatten(-2))

    def _of_documents(self, x: Tensor, packing: Packing) -> Tensor:
        heads = self.projection(x.flatten(0, 1)).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads))
        table = rotary_table(packing.positions.flatten(), self.head_dim // 2)
        q, k, v = (
            y.unflatten(1, packing.positions.shape).transpose(0, 1)
            for y in (rotate_pairs(q, table), rotate_pairs(k, table), v)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=packing.seen()[:, None], enable_gqa=self.heads != self.kv_heads
        )
        return self.output(out.transpose(1, 2).flatten(-2))


class RealFFN(nn.Module):
    """down(GELU(up x)), or down(SiLU(gate x) * up x) with two thirds of the hidden channels."""

    def __init__(self, width: WidthConfig, activation: str, gain: float) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        # Equal parameters: three maps of 2/3 of the width for two of the whole.
        hidden = 8 * math.ceil(width.d_ff / 12) if self.gated else width.d_ff
        self.up = _linear(width.d_model, 2 * hidden if self.gated else hidden)
        self.down = _linear(hidden, width.d_model, gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(hidden))


class RealRMSNorm(nn.RMSNorm):
    """x / rms(x), times gains."""

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm."""
        total = x + branch
        return total, self(total)


class RealBlock(Block):
    """x += attention(norm x); x += ffn(norm x)."""

    update_name = "ffn"

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float) -> None:
        super().__init__(stage.dropout)
        self.attention_norm = RealRMSNorm(width.d_model, eps=1e-6)
        self.attention = RealAttention(width, gain)
        self.ffn_norm = RealRMSNorm(width.d_model, eps=1e-6)
        self.ffn = RealFFN(width, stage.activation, gain)


def _linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    """A Glorot-normal linear map without bias: the real counterpart of ComplexLinear's initialisation."""
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.xavier_normal_(linear.weight, gain)
    return linear


def real_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 0."""
    gain = 1 / math.sqrt(2 * width.layers * stage.loops)
    embedding = RealEmbedding(vocab_size, width.d_model, TIED_LOGIT / width.d_model)
    head = None
    if not stage.tied:
        head = nn.Linear(width.d_model, vocab_size, bias=False)
        nn.init.normal_(head.weight, std=TIED_LOGIT / width.d_model)
    return LanguageModel(
        embedding=embedding,
        blocks=[RealBlock(width, stage, gain) for _ in range(width.layers)],
        norm=RealRMSNorm(width.d_model, eps=1e-6),
        read_out=nn.Identity(),
        head=head,
    )
