"""Where documents begin that lie side by side in windows, for layers that mix tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The places of the documents in a batch of windows (B, S).

    Attributes:
        positions: of each token in its document, int64 (B, S); 0 at the start of every window, too.
        cu_seqlens: where the documents of all windows begin in the row of their tokens, and the end of that,
            int32 (documents + 1,).
    """

    positions: Tensor
    cu_seqlens: Tensor

    def seen(self) -> Tensor:
        """Whether a query (second axis) sees a key (third axis), bool (B, S, S)."""
        place = torch.arange(self.positions.shape[1], device=self.positions.device)
        begin = (place - self.positions)[..., None]
        return (begin <= place) & (place <= place[:, None])

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        positions, cu_seqlens = (part.to(device, non_blocking=True) for part in self)
        return Packing(positions, cu_seqlens)


def packing_of(positions: Tensor) -> Packing:
    """The packing of windows by the positions (B, S) of their tokens; of those on a GPU the host waits."""
    flat = positions.flatten()
    bounds = torch.cat(((flat == 0).nonzero()[:, 0], flat.new_tensor([len(flat)])))
    return Packing(positions, bounds.to(torch.int32))
