"""Intermediate results that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(output: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[None]:
    """Operations inside do not keep ``output`` = ``function(x)`` for their backward pass.

    They get ``function(x)`` computed again, once for each operation that would have kept it. ``function``
    must give the same bits each time. Under torch.compile, which decides by itself what to recompute,
    without gradients, and inside ``recomputed_call``, which keeps nothing anyway, this does nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _inside.get():
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


# Inside ``recomputed_call``: hooks of one's own would take tensors from those that it keeps none by.
_inside: ContextVar[bool] = ContextVar("inside recomputed_call", default=False)


def recomputed_call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are kept (Chen et al. 2016).

    The backward pass calls it again, with the same random numbers and under the same autocast.
    """
    return checkpoint(_call, function, *arguments, use_reentrant=False)


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    before = _inside.set(True)
    try:
        return function(*arguments)
    finally:
        _inside.reset(before)
