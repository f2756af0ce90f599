"""The step in Triton: one launch for all parts, bound by memory.

The kernel finds the tensors of a part by their addresses in a table, so that nothing is copied together. A
program updates a block of one run of a part. Of an element it reads parameter, gradient and both moments and
writes parameter and moments, 14 bytes, in accesses of 16 bytes where a block is whole, its addresses are
multiples of 16 and its position is even; other blocks are accessed element by element. Planes that share
their second moment also read each other's gradient.

Arithmetic of an element: 15 operations in float32, a root and two divisions among them, each rounded to
nearest by itself (no FMA), and 9 in integers for the random bits. sm_90 takes 82 instructions for all of it,
at which an H100 could do 1.5 times the elements that its memory moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.adamw import eager, noise
from kernels.launch import Options, ceil_div, launch, pinned_beside
from kernels.tiles import ANY_WIDTH
from kernels.triton_import import INTERPRETED, jit, tl

if TYPE_CHECKING:
    from kernels.adamw import Coefficients, Part

PINNED = pinned_beside(__file__)
ALIGNMENT = 16
# Changes nothing but the sign of a zero: for launches that are measured.
IDLE = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0)

# Of a row of the table, see _table.
COLUMNS = tl.constexpr(11)
WEYL = tl.constexpr(noise.WEYL)
FIRST = tl.constexpr(noise.FIRST)
SECOND = tl.constexpr(noise.SECOND)
FLOOR = tl.constexpr(eager.FLOOR)
IN_INTERPRETER = tl.constexpr(INTERPRETED)


@jit
def _hashes(pairs, key):
    x = pairs.to(tl.uint32) * WEYL + key.to(tl.uint32)
    x ^= x >> 16
    x = (x * FIRST) ^ (key >> 32).to(tl.uint32)
    x ^= x >> 15
    return x * SECOND


@jit
def _random_bits(start, key, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    if WHOLE:
        # Of an even position.
        x = _hashes((start >> 1) + tl.arange(0, BLOCK // 2), key)
        return tl.interleave(x & 0xFFFF, x >> 16)
    positions = start + tl.arange(0, BLOCK)
    x = _hashes(positions >> 1, key)
    return tl.where((positions & 1) == 0, x & 0xFFFF, x >> 16)


@jit
def _at(address, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.int16))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# Numbers in bfloat16 are read and written as their bits, so that every rounding is here.
@jit
def _read(pointers, mask, WHOLE: tl.constexpr):
    bits = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0)
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def _write(pointers, bits, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, bits)
    else:
        tl.store(pointers, bits, mask=mask)


@jit
def _raised(value, addend):
    """The upper half of the bits after a sum. All bits of a GPU's NaN are set, and it would overflow."""
    bits = value.to(tl.uint32, bitcast=True)
    return (tl.where(value == value, bits + addend, 0x7FC00000) >> 16).to(tl.int16)


@jit
def _nearest(value):
    """Ties go to even. The interpreter's own conversion cuts off."""
    if IN_INTERPRETER:
        return _raised(value, ((value.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF)
    return value.to(tl.bfloat16).to(tl.int16, bitcast=True)


@jit
def _update(
    row, first, count, keep_m, gain_m, keep_v, gain_v, offset, rate, shrink,
    PAIRS: tl.constexpr, ROUND_MOMENTS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    mask = at < count
    p_at = _at(tl.load(row), WHOLE) + at
    m_at = _at(tl.load(row + 2), WHOLE) + at
    v_at = _at(tl.load(row + 3), WHOLE) + at
    gradient = _at(tl.load(row + 1), WHOLE)
    p = _read(p_at, mask, WHOLE)
    g = _read(gradient + at, mask, WHOLE)
    m = _read(m_at, mask, WHOLE)
    v = _read(v_at, mask, WHOLE)
    m = m * keep_m + g * gain_m
    g *= gain_v
    square = g * g
    if PAIRS:
        plane = tl.load(row + 9)
        odd = ((tl.load(row + 8) + at) // tl.maximum(plane, 1)) % 2
        other = _read(gradient + (at + plane * (1 - 2 * odd)), mask, False) * gain_v
        square = tl.where(plane > 0, square + other * other, square)
    v = v * keep_v + square
    size = v + FLOOR
    size *= tl.div_rn(1.0, tl.sqrt_rn(size))
    p = p * shrink - tl.div_rn(m, size + offset) * rate
    bits = _random_bits(tl.load(row + 5) + first, tl.load(row + 6), WHOLE, BLOCK)
    _write(p_at, _raised(p, bits), mask, WHOLE)
    if ROUND_MOMENTS:
        _write(m_at, _raised(m, bits), mask, WHOLE)
        _write(v_at, _raised(v, bits), mask, WHOLE)
    else:
        _write(m_at, _nearest(m), mask, WHOLE)
        _write(v_at, _nearest(v), mask, WHOLE)


@jit
def _adamw_kernel(
    table, blocks, keep_m, gain_m, keep_v, gain_v, offset, rate, shrink,
    PAIRS: tl.constexpr, ROUND_MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = blocks + 2 * tl.program_id(0)
    row = table + tl.load(program).to(tl.int64) * COLUMNS
    first = tl.load(program + 1).to(tl.int64) * BLOCK
    count = tl.load(row + 4)
    shrink = tl.where(tl.load(row + 7) != 0, shrink, 1.0)
    if (tl.load(row + 10) != 0) & (first + BLOCK <= count):
        _update(
            row, first, count, keep_m, gain_m, keep_v, gain_v, offset, rate, shrink,
            PAIRS, ROUND_MOMENTS, True, BLOCK,
        )  # fmt: skip
    else:
        # In pieces, because every element has an address of its own here.
        for piece in range(first, tl.minimum(first + BLOCK, count), BLOCK // 8):
            _update(
                row, piece, count, keep_m, gain_m, keep_v, gain_v, offset, rate, shrink,
                PAIRS, ROUND_MOMENTS, False, BLOCK // 8,
            )  # fmt: skip


def step(
    parts: Sequence[Part],
    gradients: Sequence[Tensor],
    keys: Sequence[int],
    numbers: Coefficients,
    round_moments: bool,
) -> None:
    """Reads 8 bytes an element and writes 6."""
    like = parts[0].parameter
    table = _table(parts, gradients, keys)
    counts = tuple(part.parameter.numel() // len(part.starts) for part in parts for _ in part.starts)
    constants = {"PAIRS": any(part.plane for part in parts), "ROUND_MOMENTS": round_moments}

    def run(options: Options, numbers: Sequence[float] = IDLE) -> None:
        blocks = _blocks(counts, options["BLOCK"], like.device)
        # Otherwise the bits would be those of one compiler.
        launch(
            _adamw_kernel, (len(blocks),), table, blocks, *numbers,
            **constants, **options, enable_fp_fusion=False,
        )  # fmt: skip

    run(PINNED.choose("adamw", like, ANY_WIDTH, run, sum(counts), *constants.values()), numbers)


def _table(parts: Sequence[Part], gradients: Sequence[Tensor], keys: Sequence[int]) -> Tensor:
    """int64 (runs, 11): a row for each run of each part.

    Addresses of parameter, gradient, first and second moment, number of elements, position in the whole
    parameter, key, whether it decays, position in the part, elements of a plane, whether whole blocks can
    be accessed 16 bytes at a time and begin at even positions.
    """
    rows = []
    for part, gradient, key in zip(parts, gradients, keys, strict=True):
        tensors = (part.parameter, gradient, part.exp_avg, part.exp_avg_sq)
        beginnings = [tensor.data_ptr() for tensor in tensors]
        count = part.parameter.numel() // len(part.starts)
        word = (key + 2**63) % 2**64 - 2**63
        for number, start in enumerate(part.starts):
            inside = number * count
            addresses = [beginning + 2 * inside for beginning in beginnings]
            aligned = start % 2 == 0 and not any(address % ALIGNMENT for address in addresses)
            rows.append((*addresses, count, start, word, part.decays, inside, part.plane, aligned))
    device = parts[0].parameter.device
    if device.type == "cuda":
        # Pinned, so that the host need not wait.
        return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(rows, dtype=torch.int64, device=device)


@lru_cache(maxsize=8)
def _blocks(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 (blocks, 2): of each block of so many elements its run and its number there."""
    numbers = torch.tensor([ceil_div(count, size) for count in counts], device="cpu")
    runs = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), numbers)
    before = torch.repeat_interleave(numbers.cumsum(0) - numbers, numbers)
    inside = torch.arange(len(runs), device="cpu") - before
    return torch.stack((runs, inside), 1).int().to(device)


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every variant, by a label; each call launches a kernel."""
    return {
        f"{' '.join(('bfloat16', *words))}": partial(_compile_step, "pairs" in words, "rounded" in words)
        for words in ((), ("rounded",), ("pairs",), ("pairs", "rounded"))
    }


def _compile_step(pairs: bool, round_moments: bool) -> None:
    from kernels.adamw import Part, coefficients

    w, g, m, v = torch.empty(4, 2, 4096, dtype=torch.bfloat16)
    numbers = coefficients(1e-3, (0.9, 0.95), 1e-8, 0.1, 1)
    step([Part(w, m, v, True, plane=4096 * pairs)], [g], [0], numbers, round_moments)
