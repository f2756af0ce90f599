"""The block that the decoders of stages 0 to 3 repeat."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from muse.layers.packing import Packing
from muse.models.trunk import Sublayer, TrunkState


class Block(nn.Module):
    """x += mixer(norm x); x += update(norm x): tokens are mixed, then each state is moved alone.

    A subclass has both, and their norms as ``<name>_norm``, under the names that checkpoints hold.

    Args:
        dropout: share of what is added that is set to 0 in training.
    """

    mixer_name = "attention"
    update_name: str

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def new_cache(self, longest: int) -> Any:
        """What the mixer keeps of the tokens before, without tokens."""
        return getattr(self, self.mixer_name).new_cache(longest)

    def sublayers(self, cache: Any = None, packing: Packing | None = None) -> list[Sublayer]:
        """What is added to the state, in turn."""
        return [
            Sublayer(getattr(self, f"{name}_norm"), getattr(self, name), self.dropout, *own)
            for name, own in ((self.mixer_name, (cache, packing)), (self.update_name, ()))
        ]

    def forward(
        self, x: Tensor | TrunkState, cache: Any = None, packing: Packing | None = None
    ) -> Tensor | TrunkState:
        mixing, updating = self.sublayers(cache, packing)
        if isinstance(x, TrunkState):
            return x.through((mixing, updating))
        x, normal = updating.norm.of_sum(x, mixing(x))  # type: ignore[operator]
        return x + self.dropout(updating.map(normal))
