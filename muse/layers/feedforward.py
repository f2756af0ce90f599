"""Complex feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from muse.layers.activation import build_activation
from muse.layers.init import modulus_median, rayleigh_scale
from muse.layers.linear import ComplexLinear
from muse.layers.recompute import recomputed


class ComplexFFN(nn.Module):
    """down(activation(up(z))) on planar states.

    The activated hidden state is not kept for the backward pass: it is computed again from the hidden
    state before the activation, one pass over memory against two kept copies.

    Args:
        d_model: complex channels.
        d_ff: complex hidden channels.
        activation: name of the activation.
        init: initialisation of both maps.
        gain: factor on the initial second map.
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "split_gelu", init: str = "glorot", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.up = ComplexLinear(d_model, d_ff, bias=False, init=init)
        median = modulus_median(rayleigh_scale(d_model, d_ff, init), d_model)
        self.activation = build_activation(activation, d_ff, median)
        self.down = ComplexLinear(d_ff, d_model, bias=False, init=init, gain=gain)

    def forward(self, z: Tensor) -> Tensor:
        active, hidden = self.activation.of_product(z, self.up.weight)
        with recomputed(active, self.activation, hidden):
            return self.down(active)
