"""The tiles of tokens that a scan is cut into, for both implementations.

Within a tile the state is written in a frame that turns with the eigenvalues: with P_j = e^(i angle (j + 1))
for the token j of a tile, g_j = P_j h_j and h_j = |lambda_j| h_(j-1) + conj(P_j) sqrt(1 - |lambda_j|^2) u_j,
a recurrence with real factors, the same for both planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch import ceil_div
from kernels.planar import precise

# Tokens of a tile.
TILE = 32


def tile_count(u: Tensor) -> int:
    """Tiles of the tokens of u (B, S, 2, K)."""
    return ceil_div(u.shape[1], TILE)


def entries_like(u: Tensor) -> Tensor:
    """Room for the state before each tile of u (B, S, 2, K): planar (B, tiles, 2, K)."""
    return u.new_empty(u.shape[0], tile_count(u), 2, u.shape[3], dtype=precise(u))


def frame(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """P of each token of a tile, planar (TILE, 2, K)."""
    # In double precision, because the error of a product grows with it and the angle is taken modulo 2 pi.
    turns = torch.arange(1, TILE + 1, device=angle.device)[:, None] * angle.double()
    return torch.stack((turns.cos(), turns.sin()), 1).to(dtype)
