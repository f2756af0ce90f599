"""How the kernels of activations and rotary positions are laid over tokens and channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch import Options, Pinned, ceil_div, launch, next_power_of_2

# Kernels whose configuration does not depend on the number of channels are pinned under this width.
ANY_WIDTH = 1


def by_tiles(
    pinned: Pinned,
    kernel: Any,
    z: Tensor,
    tokens: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    *deciding: object,
    heads: tuple[int, ...] = (),
    sums: int | None = None,
    **constants: object,
) -> Tensor | None:
    """Launch a kernel without whole rows on ``tensors``, the tokens and ``numbers``.

    Args:
        pinned: the configurations of its operation.
        kernel: one whose programs stand for tokens, ``heads`` and channels.
        z: whose last axis are the channels.
        tokens: how many.
        tensors: the first arguments.
        numbers: the last arguments.
        deciding: what else decides about the time.
        heads: the axis of the grid between tokens and channels, if there is one.
        sums: how many numbers a channel the kernel sums over tokens, if it takes room for them behind
            ``tensors``; those that do sum run the pinned number of programs in all, others one a tile.
        constants: of the kernel.

    Returns:
        The sums of each program along the tokens, float32 (programs, sums, D).
    """
    width = z.shape[-1]

    def run(chosen: Options) -> Tensor | None:
        options = dict(chosen)
        block = min(next_power_of_2(width), options.pop("COLUMNS"))
        rows = options.pop("TILE") // block
        programs, columns = ceil_div(tokens, rows), ceil_div(width, block)
        most = options.pop("PROGRAMS", 0)
        if sums:
            programs = min(programs, ceil_div(most, columns))
        partials = None if sums is None else z.new_empty(programs, sums, width, dtype=torch.float32)
        arguments = tensors if partials is None else (*tensors, partials)
        grid = (programs, *heads, columns)
        launch(kernel, grid, *arguments, tokens, *numbers, **constants, ROWS=rows, BLOCK_D=block, **options)
        return partials

    name = kernel.__name__.strip("_").removesuffix("_kernel")
    return run(pinned.choose(name, z, ANY_WIDTH, run, tokens, width, *deciding))
