"""Stage 1: the complex decoder, and the literal block of the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.layers import (
    ComplexAttention,
    ComplexEmbedding,
    ComplexFFN,
    ComplexLayerNorm,
    ComplexLinear,
    ComplexRMSNorm,
    ModReLU,
)
from muse.layers.init import modulus_median, rayleigh_scale
from muse.models.block import Block
from muse.models.language_model import LanguageModel
from muse.models.real import TIED_LOGIT


class ComplexBlock(Block):
    """z += ComplexAttention(norm z); z += ComplexFFN(norm z)."""

    update_name = "ffn"

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float) -> None:
        super().__init__(stage.dropout)
        self.attention_norm = build_norm(stage.norm, width.d_model)
        self.attention = ComplexAttention(
            width.d_model, width.heads, width.kv_heads, stage.score, stage.init, gain
        )
        self.ffn_norm = build_norm(stage.norm, width.d_model)
        self.ffn = ComplexFFN(width.d_model, width.d_ff, stage.activation, stage.init, gain)


class SeedBlock(nn.Module):
    """The seeds' block: norm, ComplexLinear, ModReLU, dropout, residual, norm. It mixes no tokens."""

    def __init__(self, features: int, stage: StageConfig, gain: float) -> None:
        super().__init__()
        self.norm_in = ComplexRMSNorm(features)
        self.linear = ComplexLinear(features, features, init=stage.init, gain=gain)
        median = modulus_median(gain * rayleigh_scale(features, features, stage.init), features)
        self.activation = ModReLU(features, bias=-median)
        self.dropout = nn.Dropout(stage.dropout) if stage.dropout else nn.Identity()
        self.norm_out = ComplexRMSNorm(features)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm_out(z + self.dropout(self.activation(self.linear(self.norm_in(z)))))


class Flatten(nn.Module):
    """[re | im]: the real inner product with a row of the head is then Re(z conj(w))."""

    def forward(self, z: Tensor) -> Tensor:
        return z.flatten(-2)


class RealPart(nn.Module):
    """Re z."""

    def forward(self, z: Tensor) -> Tensor:
        return z[..., 0, :]


def build_norm(name: str, features: int) -> ComplexRMSNorm | ComplexLayerNorm:
    """The normalisation called ``name`` in the configuration."""
    return ComplexRMSNorm(features) if name == "rms" else ComplexLayerNorm(features)


def complex_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int, seq_len: int) -> LanguageModel:
    """Build stage 1; ``mixer=none`` builds the model of the seeds."""
    if stage.mixer == "none":
        return _seed_model(stage, width, vocab_size, seq_len)
    gain = 1 / math.sqrt(2 * width.layers * stage.loops)
    blocks = [ComplexBlock(width, stage, gain) for _ in range(width.layers)]
    return decoder_of(blocks, stage, width, vocab_size)


def decoder_of(
    blocks: Sequence[nn.Module], stage: StageConfig, width: WidthConfig, vocab_size: int
) -> LanguageModel:
    """Put an embedding before the blocks, and a norm and a head after them."""
    rms = TIED_LOGIT / width.d_model
    head = None
    if not stage.tied:
        head = nn.Linear(2 * width.d_model, vocab_size, bias=False)
        nn.init.normal_(head.weight, std=rms * 0.5**0.5)
    return LanguageModel(
        embedding=ComplexEmbedding(vocab_size, width.d_model, rms, stage.embedding_init, stage.zeta_scale),
        blocks=list(blocks),
        norm=build_norm(stage.norm, width.d_model),
        read_out=Flatten(),
        head=head,
    )


def _seed_model(stage: StageConfig, width: WidthConfig, vocab_size: int, seq_len: int) -> LanguageModel:
    gain = 1 / math.sqrt(width.layers * stage.loops)
    head = nn.Linear(width.d_model, vocab_size)
    nn.init.normal_(head.weight, std=TIED_LOGIT / width.d_model)
    nn.init.zeros_(head.bias)
    return LanguageModel(
        embedding=ComplexEmbedding(
            vocab_size,
            width.d_model,
            init=stage.embedding_init,
            zeta_scale=stage.zeta_scale,
            positions=seq_len,
        ),
        blocks=[SeedBlock(width.d_model, stage, gain) for _ in range(width.layers)],
        norm=ComplexRMSNorm(width.d_model),
        read_out=RealPart(),
        head=head,
    )
