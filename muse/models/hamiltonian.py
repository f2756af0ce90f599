"""Stage 2: the decoder whose feed-forward maps are Hamiltonian flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from muse.config import StageConfig, WidthConfig
from muse.dynamics import DuffingPotential, HamiltonianNeuralODE, MLPPotential, Potential
from muse.layers import ComplexAttention
from muse.models.block import Block
from muse.models.complex import build_norm, decoder_of
from muse.models.language_model import LanguageModel


class HamiltonianFlow(nn.Module):
    """Phi(z) - z for flows Phi that take turns in which plane is the position.

    A force acts on p and sees q, so of two flows with the state multiplied by i between them each plane has
    one. What the flows change is what the block adds, with no linear map in or out.

    Args:
        width: sizes of the decoder.
        stage: options of the flow.
        name: what messages call the flows, with a number.
    """

    def __init__(self, width: WidthConfig, stage: StageConfig, name: str) -> None:
        super().__init__()
        self.odes = nn.ModuleList(
            HamiltonianNeuralODE(
                flow_potential(width, stage),
                stage.ode_steps,
                stage.dt,
                stage.integrator,
                stage.gradient,
                stage.fraction_bits,
                stage.recon_threshold,
                stage.verify,
                f"{name}.{number}",
            )
            for number in range(stage.flows)
        )

    def forward(self, z: Tensor) -> Tensor:
        q, p = z.unbind(-2)
        for number, ode in enumerate(self.odes):
            q, p = ode(-p, q) if number else ode(q, p)
        # As many turns back.
        for _ in self.odes[1:]:
            q, p = p, -q
        return (torch.stack((q, p), -2) - z).to(z.dtype)


class HamiltonianBlock(Block):
    """z += ComplexAttention(norm z); z += HamiltonianFlow(norm z)."""

    update_name = "flow"

    def __init__(self, width: WidthConfig, stage: StageConfig, gain: float, name: str) -> None:
        super().__init__(stage.dropout)
        self.attention_norm = build_norm(stage.norm, width.d_model)
        self.attention = ComplexAttention(
            width.d_model, width.heads, width.kv_heads, stage.score, stage.init, gain
        )
        self.flow_norm = build_norm(stage.norm, width.d_model)
        self.flow = HamiltonianFlow(width, stage, name)


def hamiltonian_decoder(stage: StageConfig, width: WidthConfig, vocab_size: int) -> LanguageModel:
    """Build stage 2."""
    gain = 1 / math.sqrt(2 * width.layers * stage.loops)
    blocks = [HamiltonianBlock(width, stage, gain, f"blocks.{i}.flow") for i in range(width.layers)]
    return decoder_of(blocks, stage, width, vocab_size)


def flow_potential(width: WidthConfig, stage: StageConfig) -> Potential:
    """The potential of one flow of a block."""
    channels = width.d_model
    if stage.potential == "duffing":
        return DuffingPotential(channels)
    return MLPPotential(
        channels,
        hidden_units(width, stage),
        stage.phi,
        stage.force_precision,
        # The spring is the greater part of what pulls back at the start.
        curvature=0.3 if stage.confinement else 0.65,
        confinement=stage.confinement,
        with_context=stage.context,
    )


def hidden_units(width: WidthConfig, stage: StageConfig) -> int:
    """Of the MLP of one flow: by default as many parameters as the feed-forward block of stage 1 has."""
    if stage.potential_width is not None:
        return stage.potential_width
    # Of a hidden unit: its row of W1, its b1 and w2, its weights of the context.
    unit = width.d_model + 2 + 2 * width.d_model * stage.context
    return max(1, round(4 * width.d_model * width.d_ff / (stage.flows * unit)))
