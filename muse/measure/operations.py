"""Looks inside MUSE's own operations, which dispatch modes see as one call each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import eager
from kernels.operator import IMPLEMENTATIONS


class InsideOperations(TorchDispatchMode):
    """Runs the eager implementation of every operation, so that outer dispatch modes see what it does.

    Args:
        closed: operations that stay one call.
    """

    def __init__(self, closed: Collection[Any] = ()) -> None:
        super().__init__()
        self.closed = closed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        implementation = IMPLEMENTATIONS.get(func)
        if func in self.closed:
            return func(*args, **kwargs)
        # An implementation may call other operations.
        with self, eager():
            if implementation is not None:
                return implementation(*args, **kwargs)
            # Inside an implementation composites like F.linear arrive in one piece too.
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts
