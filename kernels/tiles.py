"""How the kernels of activations and rotary positions are laid over tokens and channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.launch import Options, Pinned, ceil_div, next_power_of_2

# Kernels whose configuration does not depend on the number of channels are pinned under this width.
ANY_WIDTH = 1


def by_tiles(
    pinned: Pinned,
    kernel: str,
    z: Tensor,
    tokens: int,
    run: Callable[[tuple[int, int], Options], Any],
    *more: object,
    sums: bool = False,
) -> Any:
    """Call ``run`` with a grid over tokens and channels, and the constants, of a kernel without whole rows.

    A kernel that sums over tokens runs the pinned number of programs in all, others one a tile. ``more`` is
    what else decides about the time.
    """
    width = z.shape[-1]

    def run_with(chosen: Options) -> Any:
        options = dict(chosen)
        block = min(next_power_of_2(width), options.pop("COLUMNS"))
        rows = options.pop("TILE") // block
        programs, columns = ceil_div(tokens, rows), ceil_div(width, block)
        most = options.pop("PROGRAMS", 0)
        if sums:
            programs = min(programs, ceil_div(most, columns))
        return run((programs, columns), {"ROWS": rows, "BLOCK_D": block, **options})

    return run_with(pinned.choose(kernel, z, ANY_WIDTH, run_with, tokens, width, *more))
