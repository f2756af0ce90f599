"""The scan in Triton: every tile by itself, what tiles hand on one after the other, and every tile again.

Traffic is given for T tokens of K channels, e bytes a number of u and f of log_decay. What tiles hand on is
12 bytes a channel and tile, little beside it. The work is a scan of log2(TILE) steps of 5 FLOPs a number, and
some 20 FLOPs around it: all kernels are bound by memory. In a tile the order of all sums is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.complex_scan.tiles import TILE, entries_like, frame, tile_count
from kernels.launch import Options, ceil_div, launch, next_power_of_2, pinned_beside
from kernels.tiles import ANY_WIDTH
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)


@jit
def _after(decay, re, im, next_decay, next_re, next_im):
    return decay * next_decay, next_decay * re + next_re, next_decay * im + next_im


@jit
def _turned(re, im, cos, sin):
    return re * cos - im * sin, re * sin + im * cos


@jit
def _squared_scale(log_decay):
    """1 - e^x of x = 2 log_decay, to the last digits where x is small, which the difference has not."""
    x = 2 * log_decay
    series = 1.0 + x / 8 * (1.0 + x / 9 * (1.0 + x / 10))
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series))
    return tl.where(x > -1.0, -x * series, 1 - tl.exp(x))


@jit
def _load_planes(planes, at, K, mask):
    re = tl.load(planes + at, mask=mask, other=0.0).to(tl.float32)
    return re, tl.load(planes + at + K, mask=mask, other=0.0).to(tl.float32)


@jit
def _store_planes(planes, at, K, re, im, mask):
    tl.store(planes + at, re, mask=mask)
    tl.store(planes + at + K, im, mask=mask)


@jit
def _row(x, rows, row):
    return tl.sum(tl.where(rows == row, x, 0.0), 0)


@jit
def _states(u, log_decay, frame, first, tokens, rows, cols, length, K, BEFORE: tl.constexpr):
    """|lambda| products and h in a tile that begins with zeros; BEFORE gives those before each token."""
    earlier = rows - BEFORE
    mask = (earlier >= 0) & (first + earlier < length) & (cols < K)
    at = tokens - BEFORE
    logs = tl.load(log_decay + at * K + cols, mask=mask, other=0.0).to(tl.float32)
    re, im = _load_planes(u, at * (2 * K) + cols, K, mask)
    cos, sin = _load_planes(frame, earlier * (2 * K) + cols, K, mask)
    scale = tl.sqrt(_squared_scale(logs))
    re, im = _turned(scale * re, scale * im, cos, -sin)
    return tl.associative_scan((tl.exp(logs), re, im), 0, _after)


@jit
def _adjoints(grad, log_decay, frame, first, tokens, rows, cols, length, K, TILE: tl.constexpr):
    """Products of |lambda| from the next token on, and the gradient of h, if the tile's end has none."""
    mask = (first + rows < length) & (cols < K)
    later = (rows + 1 < TILE) & (first + rows + 1 < length) & (cols < K)
    logs = tl.load(log_decay + (tokens + 1) * K + cols, mask=later, other=0.0).to(tl.float32)
    re, im = _load_planes(grad, tokens * (2 * K) + cols, K, mask)
    cos, sin = _load_planes(frame, rows * (2 * K) + cols, K, mask)
    re, im = _turned(re, im, cos, -sin)
    return tl.associative_scan((tl.exp(logs), re, im), 0, _after, reverse=True)


@jit
def _ends_kernel(
    planes, log_decay, frame, ends, kept, length, tiles, K,
    BACKWARD: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h at the end of a tile that begins with zeros, and the product of all |lambda|.

    BACKWARD: the gradient of the state before a tile, if that of the state after it is 0.
    """
    tile, item = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, TILE)[:, None]
    cols = (tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first = tile * TILE
    tokens = item.to(tl.int64) * length + first + rows
    if BACKWARD:
        product, re, im = _adjoints(planes, log_decay, frame, first, tokens, rows, cols, length, K, TILE)
        own = (rows == 0) & (cols < K)
        decay = tl.exp(tl.load(log_decay + tokens * K + cols, mask=own, other=0.0).to(tl.float32))
        product, re, im = decay * product, decay * re, decay * im
        row = 0
    else:
        product, re, im = _states(planes, log_decay, frame, first, tokens, rows, cols, length, K, 0)
        row = TILE - 1
    at = item.to(tl.int64) * tiles + tile
    cols = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(kept + at * K + cols, _row(product, rows, row), mask=cols < K)
    _store_planes(ends, at * (2 * K) + cols, K, _row(re, rows, row), _row(im, rows, row), cols < K)


@jit
def _carry_kernel(
    ends, kept, frame, start, carried, end, tiles, last, K,
    BACKWARD: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What comes into each tile from the one before, or in BACKWARD from the one after it."""
    item = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = cols < K
    re, im = _load_planes(start, item * (2 * K) + cols, K, mask)
    for step in range(tiles):
        tile = step
        if BACKWARD:
            tile = tiles - 1 - step
        at = item * tiles + tile
        _store_planes(carried, at * (2 * K) + cols, K, re, im, mask)
        row = tl.where(tile == tiles - 1, last, TILE - 1)
        cos, sin = _load_planes(frame, row * (2 * K) + cols, K, mask)
        product = tl.load(kept + at * K + cols, mask=mask, other=0.0)
        own_re, own_im = _load_planes(ends, at * (2 * K) + cols, K, mask)
        if BACKWARD:
            re, im = _turned(re, im, cos, -sin)
            re, im = own_re + product * re, own_im + product * im
        else:
            re, im = own_re + product * re, own_im + product * im
            re, im = _turned(re, im, cos, sin)
    _store_planes(end, item * (2 * K) + cols, K, re, im, mask)


@jit
def _outputs_kernel(
    u, log_decay, frame, entries, g, length, tiles, K,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, item = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, TILE)[:, None]
    cols = (tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first = tile * TILE
    tokens = item.to(tl.int64) * length + first + rows
    product, re, im = _states(u, log_decay, frame, first, tokens, rows, cols, length, K, 0)
    entry = (item.to(tl.int64) * tiles + tile) * (2 * K) + cols
    start_re, start_im = _load_planes(entries, entry, K, cols < K)
    mask = (first + rows < length) & (cols < K)
    cos, sin = _load_planes(frame, rows * (2 * K) + cols, K, mask)
    re, im = _turned(re + product * start_re, im + product * start_im, cos, sin)
    _store_planes(g, tokens * (2 * K) + cols, K, re, im, mask)


@jit
def _backward_kernel(
    grad, u, log_decay, frame, entries, exits, grad_u, grad_log_decay, grad_angle,
    length, tiles, last, K,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, item = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, TILE)[:, None]
    cols = (tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first = tile * TILE
    tokens = item.to(tl.int64) * length + first + rows
    mask = (first + rows < length) & (cols < K)
    at = item.to(tl.int64) * tiles + tile

    product, re, im = _adjoints(grad, log_decay, frame, first, tokens, rows, cols, length, K, TILE)
    exit_re, exit_im = _load_planes(exits, at * (2 * K) + cols, K, cols < K)
    row = tl.where(tile == tiles - 1, last, TILE - 1)
    cos, sin = _load_planes(frame, row * (2 * K) + cols, K, cols < K)
    exit_re, exit_im = _turned(exit_re, exit_im, cos, -sin)
    adjoint_re, adjoint_im = re + product * exit_re, im + product * exit_im

    product, re, im = _states(u, log_decay, frame, first, tokens, rows, cols, length, K, 1)
    start_re, start_im = _load_planes(entries, at * (2 * K) + cols, K, cols < K)
    before_re, before_im = re + product * start_re, im + product * start_im

    logs = tl.load(log_decay + tokens * K + cols, mask=mask, other=0.0).to(tl.float32)
    decay, squared = tl.exp(logs), _squared_scale(logs)
    scale = tl.sqrt(squared)
    cos, sin = _load_planes(frame, rows * (2 * K) + cols, K, mask)
    re, im = _load_planes(u, tokens * (2 * K) + cols, K, mask)
    re, im = _turned(re, im, cos, -sin)
    by_scale = adjoint_re * re + adjoint_im * im
    by_decay = adjoint_re * before_re + adjoint_im * before_im
    # As in eager: where nothing decays nothing comes in, and the slope of the scale has no bound.
    slope = decay * decay / tl.maximum(scale, 1.1920928955078125e-07)
    tl.store(grad_log_decay + tokens * K + cols, decay * by_decay - slope * by_scale, mask=mask)
    turning = tl.where(mask, decay * (adjoint_im * before_re - adjoint_re * before_im), 0.0)
    re, im = _turned(scale * adjoint_re, scale * adjoint_im, cos, sin)
    _store_planes(grad_u, tokens * (2 * K) + cols, K, re, im, mask)
    cols = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(grad_angle + at * K + cols, tl.sum(turning, 0), mask=cols < K)


def _by_channels(
    kernel: Any, like: Tensor, grid: tuple[int, ...], arguments: tuple[object, ...], **constants: object
) -> None:
    """Launch a kernel, whose last number is K, on ``grid`` times blocks of channels."""
    channels = like.shape[3]

    def run(chosen: Options) -> None:
        options = dict(chosen)
        block = min(next_power_of_2(channels), options.pop("COLUMNS"))
        programs = (*grid, ceil_div(channels, block))
        launch(kernel, programs, *arguments, channels, **constants, TILE=TILE, BLOCK_K=block, **options)

    name = kernel.__name__.strip("_").removesuffix("_kernel")
    run(PINNED.choose(name, like, ANY_WIDTH, run, *grid, channels))


def _carried(
    planes: Tensor, log_decay: Tensor, turn: Tensor, start: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    """What comes into each tile, (B, tiles, 2, K), and what is left behind the last one, (B, 2, K).

    Reads planes and log_decay, T K (2 e + f) bytes.
    """
    (batch, length), tiles = planes.shape[:2], tile_count(planes)
    ends, carried = entries_like(planes), entries_like(planes)
    kept, end = torch.empty_like(ends[:, :, 0]), torch.empty_like(ends[:, 0])
    of_tiles = (planes, log_decay, turn, ends, kept, length, tiles)
    _by_channels(_ends_kernel, planes, (tiles, batch), of_tiles, BACKWARD=backward)
    last = (length - 1) % TILE
    of_rows = (ends, kept, turn, start.float().contiguous(), carried, end, tiles, last)
    _by_channels(_carry_kernel, planes, (batch,), of_rows, BACKWARD=backward)
    return carried, end


def scan(u: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reads u and log_decay twice and writes g: T K (6 e + 2 f) bytes."""
    u, log_decay, turn = u.contiguous(), log_decay.contiguous(), frame(angle, torch.float32)
    (batch, length), tiles = u.shape[:2], tile_count(u)
    entries, final = _carried(u, log_decay, turn, state, backward=False)
    g = torch.empty_like(u)
    _by_channels(_outputs_kernel, u, (tiles, batch), (u, log_decay, turn, entries, g, length, tiles))
    return g, final, entries


def scan_backward(
    grad: Tensor, grad_final: Tensor, u: Tensor, log_decay: Tensor, angle: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reads the gradient twice, u once and log_decay thrice, and writes two gradients: T K (8 e + 4 f)."""
    grad, u, log_decay = grad.contiguous(), u.contiguous(), log_decay.contiguous()
    turn, (batch, length), tiles = frame(angle, torch.float32), u.shape[:2], tile_count(u)
    exits, grad_state = _carried(grad, log_decay, turn, grad_final, backward=True)
    grad_u, grad_log_decay = torch.empty_like(u), torch.empty_like(log_decay)
    grad_angle = torch.empty_like(entries[:, :, 0])
    tensors = (grad, u, log_decay, turn, entries, exits, grad_u, grad_log_decay, grad_angle)
    last = (length - 1) % TILE
    _by_channels(_backward_kernel, u, (tiles, batch), (*tensors, length, tiles, last))
    return grad_u, grad_log_decay, grad_angle.sum((0, 1)).to(angle.dtype), grad_state


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, by a label; each call launches the kernels of both passes."""
    return {
        f"scan {str(dtype).removeprefix('torch.')}": partial(_compile_scan, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    }


def _compile_scan(dtype: torch.dtype) -> None:
    u, log_decay, angle = torch.empty(2, 64, 2, 64, dtype=dtype), torch.empty(2, 64, 64), torch.empty(64)
    state = torch.empty(2, 2, 64)
    g, final, entries = scan(u, log_decay, angle, state)
    scan_backward(g, final, u, log_decay, angle, entries)
