"""Layers that take their gradient in a way that may fail, and then go on in a safe one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muse.processes.ranks import all_reduced_max, ranks


class FallsBack(nn.Module):
    """A layer that undoes its forward pass, unless that failed once.

    Args:
        name: what messages call this layer.
    """

    # What messages call the safe way.
    safe_way = "checkpointing"
    fallback_count: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # See ``deferred_checks``.
        self.deferred = False
        self.register_buffer("fallback_count", torch.zeros((), dtype=torch.int64))
        self.fallen_back = False
        self.register_load_state_dict_post_hook(_remember)

    def fall_back(self, reason: str) -> None:
        """Go on with checkpointing from now on; a warning says so, once."""
        self.fallback_count += 1
        # Several calls may wait for their backward passes.
        if not self.fallen_back:
            warnings.warn(f"{self.name}: {reason}; this layer goes on with {self.safe_way}", stacklevel=2)
        self.fallen_back = True


def _remember(layer: FallsBack, _: Any) -> None:
    layer.fallen_back = bool(layer.fallback_count)


def layers_that_fall_back(model: nn.Module) -> list[FallsBack]:
    """In the order of the model."""
    return [module for module in model.modules() if isinstance(module, FallsBack)]


@contextmanager
def deferred_checks(model: nn.Module) -> Iterator[None]:
    """Inside, layers that do not compare what they rebuild read nothing back from the device.

    A layer whose state left its range, or is not finite, then gives what is not finite either, and so does
    all that follows. Who finds such a loss calls the model again outside: the layer falls back there, or
    says where its state was lost.
    """
    layers = layers_that_fall_back(model)
    before = [layer.deferred for layer in layers]
    for layer in layers:
        layer.deferred = True
    try:
        yield
    finally:
        for layer, deferred in zip(layers, before, strict=True):
            layer.deferred = deferred


def agree_on_fallbacks(model: nn.Module) -> None:
    """Let a layer fall back on every rank if it did on one, so that ranks stay interchangeable.

    The count becomes the largest of any rank.
    """
    layers = layers_that_fall_back(model)
    if not layers or ranks() == 1:
        return
    counts = all_reduced_max(torch.stack([layer.fallback_count for layer in layers]))
    for layer, count in zip(layers, counts.unbind(), strict=True):
        layer.fallback_count.copy_(count)
        _remember(layer, None)
