"""Stage 3a: the scaled transformer, as a textbook writes it.

Vaswani et al., "Attention Is All You Need" (2017), with the norms before the sublayers. Fixed sinusoidal
positions, GELU, Xavier-uniform weights, biases, an untied head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.errors import ConfigError
from muse.models.language_model import LanguageModel


@dataclass
class Past:
    """Keys and values of the tokens that one layer has seen.

    Attributes:
        longest: tokens that it has room for.
        k: (B, H, longest, d_head), finite also where nothing was written yet; None before the first token.
        v: as k.
        length: tokens seen.
    """

    longest: int
    k: Tensor | None = None
    v: Tensor | None = None
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the tokens that follow, and return all there is room for."""
        if self.k is None or self.v is None:
            room = (*k.shape[:2], self.longest, k.shape[3])
            self.k, self.v = k.new_zeros(room), v.new_zeros(room)
        here = slice(self.length, self.length + k.shape[2])
        self.k[:, :, here], self.v[:, :, here] = k, v
        self.length = here.stop
        return self.k, self.v


def sinusoids(positions: Tensor, features: int) -> Tensor:
    """sin and cos of positions (S,) at geometric frequencies, float32 (S, features); features is even."""
    rates = torch.exp(
        torch.arange(0, features, 2, device=positions.device) * (-math.log(10_000.0) / features)
    )
    angles = positions[:, None].float() * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


class TransformerEmbedding(nn.Module):
    """Token embedding (V, d) times sqrt(d), plus sinusoidal positions."""

    def __init__(self, vocab_size: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        features = self.weight.shape[1]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        states = F.embedding(tokens, self.weight) * math.sqrt(features)
        return states + sinusoids(positions, features).to(states.dtype)


class TransformerAttention(nn.Module):
    """Causal multi-head self-attention.

    ``fused`` takes scaled_dot_product_attention instead of products, mask and softmax written out; the
    maths is the same.
    """

    def __init__(self, width: WidthConfig) -> None:
        super().__init__()
        self.heads = width.heads
        self.fused = False
        self.projection = _linear(width.d_model, 3 * width.d_model, apart=3)
        self.output = _linear(width.d_model, width.d_model)

    def new_cache(self, longest: int) -> Past:
        """A past without tokens, of which it may have ``longest``."""
        return Past(longest)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        length = x.shape[1]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.projection(x).chunk(3, -1))
        if past is not None:
            rows = torch.arange(past.length, past.length + length, device=x.device)
            k, v = past.extend(k, v)
            seen = torch.arange(past.longest, device=x.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen <= rows[:, None])
        elif self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
            out = scores.softmax(-1) @ v
        return self.output(out.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """x += attention(norm x); x += down(GELU(up(norm x)))."""

    def __init__(self, width: WidthConfig, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width.d_model)
        self.attention = TransformerAttention(width)
        self.ffn_norm = nn.LayerNorm(width.d_model)
        self.up = _linear(width.d_model, width.d_ff)
        self.down = _linear(width.d_ff, width.d_model)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def new_cache(self, longest: int) -> Past:
        """What attention keeps of the tokens before, without tokens."""
        return self.attention.new_cache(longest)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), past))
        return x + self.dropout(self.down(F.gelu(self.up(self.ffn_norm(x)))))


def _linear(in_features: int, out_features: int, apart: int = 1) -> nn.Linear:
    """A Xavier-uniform map with a zero bias; ``apart`` maps of out_features / apart lie in one weight."""
    linear = nn.Linear(in_features, out_features)
    for part in linear.weight.chunk(apart):
        nn.init.xavier_uniform_(part)
    nn.init.zeros_(linear.bias)
    return linear


def transformer_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 3a.

    Raises:
        ConfigError: for grouped queries, which it does not have.
    """
    if width.kv_heads != width.heads:
        raise ConfigError(
            f"model.real.kv_heads={width.kv_heads} is not possible with stage=3a, which has no grouped "
            f"queries; it must be model.real.heads={width.heads}"
        )
    return LanguageModel(
        embedding=TransformerEmbedding(vocab_size, width.d_model),
        blocks=[TransformerBlock(width, stage.dropout) for _ in range(width.layers)],
        norm=nn.LayerNorm(width.d_model),
        read_out=nn.Identity(),
        head=None if stage.tied else _linear(width.d_model, vocab_size),
    )
