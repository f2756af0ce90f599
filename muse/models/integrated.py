"""Stage 3: the decoder of stage 2 in which other mixers of tokens stand in for attention, or beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.layers import (
    ComplexAttention,
    KoopmanOperator,
    KoopmanState,
    KVCache,
    MeraRouter,
    MeraState,
)
from muse.layers.packing import Packing
from muse.models.block import Block
from muse.models.complex import build_norm, decoder_of
from muse.models.dialectic import Antithesis
from muse.models.hamiltonian import HamiltonianFlow
from muse.models.language_model import LanguageModel


@dataclass
class Caches:
    """Those of mixers that see the same tokens."""

    parts: list[KVCache | KoopmanState | MeraState]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.parts[0].length


Cache = KVCache | KoopmanState | MeraState | Caches


class MixerSum(nn.Module):
    """The sum of mixers, which are its parts by their names."""

    def __init__(self, mixers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, mixer in mixers.items():
            self.add_module(name, mixer)

    def new_cache(self, longest: int) -> Caches:
        """A cache of each without tokens."""
        return Caches([mixer.new_cache(longest) for mixer in self.children()])  # type: ignore[operator]

    def forward(self, z: Tensor, cache: Caches | None = None, packing: Packing | None = None) -> Tensor:
        caches = [None] * len(self._modules) if cache is None else cache.parts
        together = () if packing is None else (packing,)
        first, *others = (
            mixer(z, own, *together) for mixer, own in zip(self.children(), caches, strict=True)
        )
        return sum(others, first)


class IntegratedBlock(Block):
    """z += mixer(norm z); z += HamiltonianFlow(norm z), with any mixer of tokens."""

    mixer_name = "mixer"
    update_name = "flow"

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float, number: int) -> None:
        super().__init__(stage.dropout)
        self.mixer_norm = build_norm(stage.norm, width.d_model)
        self.mixer = build_mixer(width, stage, gain, number)
        self.flow_norm = build_norm(stage.norm, width.d_model)
        self.flow = HamiltonianFlow(width, stage, f"blocks.{number}.flow")


def has_koopman(stage: StageConfig, block: int) -> bool:
    """Whether a block, counted from 0, has a Koopman operator."""
    return stage.koopman != "none" and block % stage.koopman_every == 0


def has_mera(stage: StageConfig, block: int) -> bool:
    """Whether a block, counted from 0, has a MERA router."""
    return stage.mera != "none" and (block + 1) % stage.mera_every == 0


def has_attention(stage: StageConfig, block: int) -> bool:
    """Whether a block of any stage, counted from 0, has an attention."""
    replaced = (stage.koopman == "replace" and has_koopman(stage, block)) or (
        stage.mera == "replace" and has_mera(stage, block)
    )
    return stage.mixer == "attention" and not replaced


def build_mixer(width: WidthConfig, stage: StageConfig, gain: float, block: int) -> nn.Module:
    """What mixes the tokens in a block, counted from 0.

    An operator has as many observables as the model channels, and so the parameters of an attention.
    """
    mixers: dict[str, nn.Module] = {}
    if has_attention(stage, block):
        mixers["attention"] = ComplexAttention(
            width.d_model,
            width.heads,
            width.kv_heads,
            stage.score,
            stage.init,
            gain,
            stage.attention_window,
        )
    if has_koopman(stage, block):
        form = stage.koopman_angles, stage.koopman_selective
        mixers["koopman"] = KoopmanOperator(width.d_model, width.d_model, stage.init, gain, *form)
    if has_mera(stage, block):
        mixers["mera"] = MeraRouter(width.d_model, width.heads, stage.mera_levels, stage.init, gain)
    return MixerSum(mixers) if len(mixers) > 1 else next(iter(mixers.values()))


def integrated_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 3."""
    gain = 1 / math.sqrt(2 * width.layers * stage.loops)
    blocks = [IntegratedBlock(width, stage, gain, number) for number in range(width.layers)]
    decoder = decoder_of(blocks, stage, width, vocab_size)
    decoder.koopman_prediction = stage.koopman_prediction
    if stage.dialectic != "none":
        options = (stage.dialectic_candidates, stage.dialectic_rounds)
        decoder.antithesis = Antithesis(stage.dialectic, 2 * width.d_model, *options)
    return decoder
