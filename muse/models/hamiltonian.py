"""Stage 2: the decoder whose feed-forward maps are Hamiltonian flows."""

from __future__ import annotations

import math

from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.dynamics import DuffingPotential, HamiltonianNeuralODE, MLPPotential, Potential
from muse.layers import ComplexAttention, ComplexLinear
from muse.models.complex import build_norm, decoder_of
from muse.models.language_model import LanguageModel


class HamiltonianFlow(nn.Module):
    """outward(flow(inward(z))): complex linear maps into phase space and out of it.

    The maps in and out of a force are tied, W1 and its transpose; these two are not.

    Args:
        width: sizes of the decoder.
        stage: options of the flow.
        gain: factor on the initial outward map.
        name: what messages call the flow.
    """

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float, name: str) -> None:
        super().__init__()
        channels = stage.flow_width or width.d_model
        self.inward = ComplexLinear(width.d_model, channels, bias=False, init=stage.init)
        self.ode = HamiltonianNeuralODE(
            _potential(width, stage, channels),
            stage.ode_steps,
            stage.dt,
            stage.integrator,
            stage.gradient,
            stage.fraction_bits,
            stage.recon_threshold,
            stage.verify,
            name,
        )
        self.outward = ComplexLinear(channels, width.d_model, bias=False, init=stage.init, gain=gain)

    def forward(self, z: Tensor) -> Tensor:
        return self.outward(self.ode(self.inward(z)).to(z.dtype))


class HamiltonianBlock(nn.Module):
    """z += ComplexAttention(norm z); z += HamiltonianFlow(norm z)."""

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float, name: str) -> None:
        super().__init__()
        self.attention_norm = build_norm(stage.norm, width.d_model)
        self.attention = ComplexAttention(
            width.d_model, width.heads, width.kv_heads, stage.score, stage.init, gain
        )
        self.flow_norm = build_norm(stage.norm, width.d_model)
        self.flow = HamiltonianFlow(width, stage, gain, name)
        self.dropout = nn.Dropout(stage.dropout) if stage.dropout else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        z, normal = self.flow_norm.of_sum(z, self.dropout(self.attention(self.attention_norm(z))))
        return z + self.dropout(self.flow(normal))


def hamiltonian_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 2."""
    gain = 1 / math.sqrt(2 * width.layers)
    blocks = [HamiltonianBlock(width, stage, gain, f"blocks.{i}.flow") for i in range(width.layers)]
    return decoder_of(blocks, stage, width, vocab_size)


def _potential(width: WidthConfig, stage: StageConfig, channels: int) -> Potential:
    if stage.potential == "duffing":
        return DuffingPotential(channels)
    hidden = stage.potential_width
    if hidden is None:
        # As many parameters as the feed-forward block of stage 1 has: a unit is a row of W1, and b1 and w2.
        left = 4 * width.d_model * (width.d_ff - channels)
        hidden = max(1, round(left / (channels + 2)))
    return MLPPotential(channels, hidden, stage.phi, stage.force_precision)
