"""Complex token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.layers.init import zeta_
from muse.planar import multiply


class ComplexEmbedding(nn.Module):
    """Token embedding to planar states with unit mean square.

    Rows have rms modulus ``rms`` and are multiplied by 1/rms on the way in, so that the same small rows
    can serve as the output head without large initial logits.

    Args:
        vocab_size: number of tokens V.
        features: complex channels D.
        rms: root mean square of the moduli of the stored rows.
        init: ``zeta`` (phases spaced as the Riemann zeros) or ``normal``.
        zeta_scale: factor on the phases of ``zeta``.
        positions: length of learned positional phases, as in the seeds; 0 for none.
    """

    plane_axes = {"weight": 1}

    def __init__(
        self,
        vocab_size: int,
        features: int,
        rms: float = 1.0,
        init: str = "zeta",
        zeta_scale: float = 1.0,
        positions: int = 0,
    ) -> None:
        super().__init__()
        self.rms = rms
        self.weight = nn.Parameter(torch.empty(vocab_size, 2, features))
        if init == "zeta":
            zeta_(self.weight, rms, zeta_scale)
        else:
            nn.init.normal_(self.weight, std=rms * 0.5**0.5)
        self.phase = nn.Parameter(torch.zeros(positions, features)) if positions else None

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Map tokens (B, S), at positions from ``start`` on, to planar (B, S, 2, D)."""
        z = F.embedding(tokens, self.weight.flatten(1)).unflatten(-1, self.weight.shape[1:])
        if self.rms != 1.0:
            z = z * (1 / self.rms)
        if self.phase is not None:
            phase = self.phase[start : start + tokens.shape[1]]
            z = multiply(z, torch.stack((phase.cos(), phase.sin()), dim=-2))
        return z
