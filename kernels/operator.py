"""Registration of an operation as a torch.library custom op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The implementation behind each operation, for instruments that must see the products inside.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def opaque_operator(function: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> Any:
    """Register ``function`` as the custom op ``muse::<its name>``, one call to instruments, too."""
    return torch.library.custom_op(
        f"muse::{function.__name__.strip('_')}", function, mutates_args=mutates_args
    )


def operator(function: Callable[..., Any]) -> Any:
    """Register ``function`` as the custom op ``muse::<its name>`` for every device.

    The function chooses between Triton and eager by its tensors (``launch.use_triton``). It must not change
    its arguments nor return views of them. ``register_fake`` and ``register_autograd`` are for the caller.
    """
    op = opaque_operator(function)
    IMPLEMENTATIONS[op._opoverload] = function
    return op
