"""The step in PyTorch, some elements at a time, each operation rounded by itself.

So no ``lerp``, ``addcmul`` or ``add`` with a factor, which may be contracted to FMA. And no ``sqrt``, which
on a CPU is a library's and not rounded correctly everywhere, but x rsqrt(x), for ``rsqrt`` is a root and a
division there, each rounded correctly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.adamw.noise import FIRST, SECOND, WEYL

if TYPE_CHECKING:
    from kernels.adamw import Coefficients, Part

# Elements that are updated at a time: as few as still make the time of a call small beside its work.
CHUNK = 2**18
UPPER = -(2**16)
# Added to the second moment, so that its root is never 0; it changes none above 2^-102.
FLOOR = 2.0**-126


def signed(word: int) -> int:
    """The lower 32 bits as a number of int32."""
    return (word + 2**31) % 2**32 - 2**31


class Workspace:
    """Buffers for so many elements on a device: 26 bytes each.

    Numbers are tensors of a dtype that need not be converted again for every chunk.
    """

    def __init__(self, count: int, device: torch.device, numbers: Coefficients | None = None) -> None:
        pairs = count // 2 + 1
        self.floats = torch.empty(5, count, device=device)
        # The products j WEYL of consecutive j.
        self.weyl = torch.arange(pairs, dtype=torch.int32, device=device).mul_(signed(WEYL))
        self.hashes = torch.empty(2, pairs, dtype=torch.int32, device=device)
        words = [signed(word) for word in (FIRST, SECOND, 16, 0xFFFF, 15, 0x1FFFF, UPPER)]
        self.words = torch.tensor(words, dtype=torch.int32, device=device).unbind()
        self.numbers = torch.tensor(numbers or (), dtype=torch.float32, device=device).unbind()
        self.floor = torch.tensor(FLOOR, dtype=torch.float32, device=device)

    def noise(self, key: int, start: int, out: Tensor) -> Tensor:
        """The random bits of positions from ``start`` on, in [0, 2^16), into ``out`` int32 (count,)."""
        odd, count = start % 2, len(out)
        pairs = (odd + count + 1) // 2
        x, y = self.hashes[:, :pairs]
        first, second, half, lower, shift, rest, _ = self.words
        torch.add(self.weyl[:pairs], signed(start // 2 * WEYL + key), out=x)
        x.bitwise_xor_(torch.bitwise_right_shift(x, half, out=y).bitwise_and_(lower))
        x.mul_(first).bitwise_xor_(signed(key >> 32))
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=y).bitwise_and_(rest))
        x.mul_(second)
        return out.copy_(x.view(torch.uint16)[odd : odd + count])

    def round(self, target: Tensor, value: Tensor, noise: Tensor) -> None:
        """Round float32 ``value``, which is lost, to bfloat16, up with the probability of what is cut off."""
        if value.is_cuda:
            # All bits of a GPU's NaN are set, and a sum would overflow.
            value.masked_fill_(value.isnan(), torch.nan)
        value.view(torch.int32).add_(noise).bitwise_and_(self.words[-1])
        target.copy_(value)


def step(
    parts: Sequence[Part],
    gradients: Sequence[Tensor],
    keys: Sequence[int],
    numbers: Coefficients,
    round_moments: bool,
) -> None:
    """The eager implementation of ``adamw``."""
    largest = max(part.parameter.numel() // len(part.starts) for part in parts)
    work = Workspace(min(CHUNK, largest), parts[0].parameter.device, numbers)
    for part, gradient, key in zip(parts, gradients, keys, strict=True):
        w, m, v, g = (x.view(-1) for x in (part.parameter, part.exp_avg, part.exp_avg_sq, gradient))
        other = g.view(-1, 2, part.plane).flip(1).view(-1) if part.plane else None
        for start, here in _chunks(part.starts, len(w)):
            tensors = (w[here], m[here], v[here], g[here], None if other is None else other[here])
            _update(*tensors, part.decays, key, start, round_moments, work)


def _chunks(starts: Sequence[int], count: int) -> Iterator[tuple[int, slice]]:
    """Slices of a part of ``count`` elements, each with its position in the whole parameter."""
    run = count // len(starts)
    for number, start in enumerate(starts):
        for first in range(0, run, CHUNK):
            here = number * run + first
            yield start + first, slice(here, number * run + min(first + CHUNK, run))


def _update(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    other: Tensor | None,
    decays: bool,
    key: int,
    start: int,
    round_moments: bool,
    work: Workspace,
) -> None:
    p, first, second, gradient, scratch = work.floats[:, : len(w)]
    keep_m, gain_m, keep_v, gain_v, offset, rate, shrink = work.numbers
    p.copy_(w)
    first.copy_(m)
    second.copy_(v)
    gradient.copy_(g)
    first.mul_(keep_m).add_(torch.mul(gradient, gain_m, out=scratch))
    gradient.mul_(gain_v)
    gradient.mul_(gradient)
    if other is not None:
        scratch.copy_(other).mul_(gain_v)
        gradient.add_(scratch.mul_(scratch))
    second.mul_(keep_v).add_(gradient)
    noise = work.noise(key, start, scratch.view(torch.int32))
    if round_moments:
        work.round(m, torch.mul(first, 1.0, out=gradient), noise)
        work.round(v, torch.mul(second, 1.0, out=gradient), noise)
    else:
        m.copy_(first)
        v.copy_(second)
    torch.rsqrt(second.add_(work.floor), out=gradient)
    first.div_(second.mul_(gradient).add_(offset)).mul_(rate)
    if decays:
        p.mul_(shrink)
    work.round(w, p.sub_(first), noise)


def round_stochastically(target: Tensor, value: Tensor, key: int, starts: Sequence[int]) -> None:
    """Round ``value`` to a bfloat16 ``target`` in place, by the random numbers that ``adamw`` would use.

    Args:
        target: contiguous, of the size of ``value``.
        value: float32, contiguous; it is lost.
        key: from ``key_of``.
        starts: of the runs of ``target`` in the whole parameter, as ``Part`` has them.
    """
    if not target.numel():
        return
    work = Workspace(min(CHUNK, target.numel() // len(starts)), target.device)
    flat, values = target.view(-1), value.view(-1)
    for start, here in _chunks(starts, len(flat)):
        noise = work.noise(key, start, work.floats[0, : here.stop - here.start].view(torch.int32))
        work.round(flat[here], values[here], noise)
