"""How far a gradient is from that of the same map in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The largest error of a gradient in float32.
ALLOWED = 1e-5


def joined(gradients: Iterable[Tensor]) -> Tensor:
    """All elements in one float64 vector."""
    return torch.cat([gradient.detach().double().flatten() for gradient in gradients])


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    """|gradient - exact| / |exact| of vectors as ``joined`` makes them; infinite if it is not finite."""
    error = ((gradient - exact).norm() / exact.norm()).item()
    return error if error < float("inf") else float("inf")


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32 within the block, also where a GPU has a faster, coarser format.

    The fused flow takes no other, so the maps of two gradient modes would differ. Also a decorator.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
