"""What the eager implementations of norms, activations and rotary positions share.

On a CPU they work through some tokens at a time in float32 buffers that stay in the cache, so that each
tensor is read from and written to memory once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.planar import precise

# Real numbers that the eager implementation works on at a time on a CPU: its buffers then stay in the cache.
CHUNK = 2**20


def like(z: Tensor) -> Tensor:
    """A new contiguous tensor of z's shape and dtype."""
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def planes(z: Tensor) -> Tensor:
    """z (..., 2, D) seen as (2, T, D), of the same memory where that is possible."""
    return z.reshape(z.shape[:-2].numel(), *z.shape[-2:]).transpose(0, 1)


def chunk_length(x: Tensor, numbers: int) -> int:
    """How many slices of so many numbers to work on at a time."""
    return max(1, CHUNK // max(1, numbers)) if x.device.type == "cpu" else 2**62


def chunks(x: Tensor, buffers: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of tokens of x (2, T, D), and for each buffers (count, 2, T', D) in the dtype of the maths."""
    planes, tokens, width = x.shape
    step = max(1, min(tokens, chunk_length(x, planes * width)))
    work = torch.empty(buffers, planes * step * width, dtype=precise(x), device=x.device)
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        own = work[:, : planes * count * width].view(buffers, count, planes, width)
        yield slice(start, start + count), own.transpose(1, 2)


def read(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the dtype of the buffer, which is filled only where that differs."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def to_write(out: Tensor, buffer: Tensor) -> Tensor:
    """Where to compute what becomes ``out``: there, if the dtype is right."""
    return out if out.dtype == buffer.dtype else buffer


def write(out: Tensor, computed: Tensor) -> None:
    """Round into ``out`` what was not computed there."""
    if out.dtype != computed.dtype:
        out.copy_(computed)
