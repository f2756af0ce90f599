"""Intermediate results that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_as_a_whole: ContextVar[bool] = ContextVar("recomputed_as_a_whole", default=False)


@contextmanager
def recomputed(output: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[None]:
    """Operations inside do not keep ``output`` = ``function(x)`` for their backward pass.

    They get ``function(x)`` computed again, once for each operation that would have kept it. ``function``
    must give the same bits each time. Under torch.compile, which decides by itself what to recompute,
    without gradients, and where all around it is computed again as well, this does nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _as_a_whole.get():
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


@contextmanager
def recomputed_as_a_whole() -> Iterator[None]:
    """Inside, ``recomputed`` does nothing: what is inside is computed again as a whole."""
    before = _as_a_whole.set(True)
    try:
        yield
    finally:
        _as_a_whole.reset(before)


def recomputed_call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are kept (Chen et al. 2016).

    The backward pass calls it again, with the same random numbers and under the same autocast.
    """
    return checkpoint(_call, function, *arguments, use_reentrant=False)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # Hooks of one's own would take tensors from those by which checkpoint keeps none.
    with recomputed_as_a_whole():
        return function(*arguments)
