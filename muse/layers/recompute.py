"""Cheap intermediate results that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recomputed(output: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[None]:
    """Operations inside do not keep ``output`` = ``function(x)`` for their backward pass.

    They get ``function(x)`` computed again, once for each operation that would have kept it. ``function``
    must give the same bits each time. Under torch.compile, which decides by itself what to recompute,
    and without gradients this does nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    kept = x.detach()
    # Not the tensor itself: the graph keeps the hooks, and they would keep it.
    identity = id(output)

    def pack(tensor: Tensor) -> Tensor | None:
        return None if id(tensor) == identity else tensor

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        with torch.no_grad():
            return function(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
