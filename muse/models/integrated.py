"""Stage 3: the decoder of stage 2 in which Koopman operators stand in for attention, or beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.layers import ComplexAttention, KoopmanOperator, KoopmanState, KVCache
from muse.models.complex import build_norm, decoder_of
from muse.models.hamiltonian import HamiltonianFlow
from muse.models.language_model import LanguageModel
from muse.models.trunk import Sublayer, TrunkState


@dataclass
class BothCaches:
    """Those of an attention and of a Koopman operator that see the same tokens."""

    attention: KVCache
    koopman: KoopmanState

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.koopman.length


Cache = KVCache | KoopmanState | BothCaches


class AttentionAndKoopman(nn.Module):
    """Their sum."""

    def __init__(self, attention: ComplexAttention, koopman: KoopmanOperator) -> None:
        super().__init__()
        self.attention = attention
        self.koopman = koopman

    def new_cache(self, longest: int) -> BothCaches:
        """A cache of each without tokens."""
        return BothCaches(self.attention.new_cache(longest), self.koopman.new_cache(longest))

    def forward(self, z: Tensor, cache: BothCaches | None = None) -> Tensor:
        attended = self.attention(z, None if cache is None else cache.attention)
        return attended + self.koopman(z, None if cache is None else cache.koopman)


class IntegratedBlock(nn.Module):
    """z += mixer(norm z); z += HamiltonianFlow(norm z), with any mixer of tokens."""

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float, number: int) -> None:
        super().__init__()
        self.mixer_norm = build_norm(stage.norm, width.d_model)
        self.mixer = build_mixer(width, stage, gain, number)
        self.flow_norm = build_norm(stage.norm, width.d_model)
        self.flow = HamiltonianFlow(width, stage, f"blocks.{number}.flow")
        self.dropout = nn.Dropout(stage.dropout) if stage.dropout else nn.Identity()

    def new_cache(self, longest: int) -> Cache:
        """What the mixer keeps of the tokens before, without tokens."""
        return self.mixer.new_cache(longest)

    def sublayers(self, cache: Cache | None = None) -> list[Sublayer]:
        """What is added to the state, in turn."""
        return [
            Sublayer(self.mixer_norm, self.mixer, self.dropout, cache),
            Sublayer(self.flow_norm, self.flow, self.dropout),
        ]

    def forward(self, z: Tensor | TrunkState, cache: Cache | None = None) -> Tensor | TrunkState:
        if isinstance(z, TrunkState):
            return z.through(self.sublayers(cache))
        z, normal = self.flow_norm.of_sum(z, self.dropout(self.mixer(self.mixer_norm(z), cache)))
        return z + self.dropout(self.flow(normal))


def has_koopman(stage: StageConfig, block: int) -> bool:
    """Whether a block, counted from 0, has a Koopman operator."""
    return stage.koopman != "none" and block % stage.koopman_every == 0


def has_attention(stage: StageConfig, block: int) -> bool:
    """Whether a block of any stage, counted from 0, has an attention."""
    return stage.mixer == "attention" and not (stage.koopman == "replace" and has_koopman(stage, block))


def build_mixer(
    width: WidthConfig, stage: StageConfig, gain: float, block: int
) -> ComplexAttention | KoopmanOperator | AttentionAndKoopman:
    """What mixes the tokens in a block, counted from 0.

    An operator has as many observables as the model channels, and so the parameters of an attention.
    """
    parts: list[Any] = []
    if has_attention(stage, block):
        parts.append(
            ComplexAttention(width.d_model, width.heads, width.kv_heads, stage.score, stage.init, gain)
        )
    if has_koopman(stage, block):
        form = stage.koopman_angles, stage.koopman_selective
        parts.append(KoopmanOperator(width.d_model, width.d_model, stage.init, gain, *form))
    return AttentionAndKoopman(*parts) if len(parts) == 2 else parts[0]


def integrated_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 3."""
    gain = 1 / math.sqrt(2 * width.layers * stage.loops)
    blocks = [IntegratedBlock(width, stage, gain, number) for number in range(width.layers)]
    return decoder_of(blocks, stage, width, vocab_size)
