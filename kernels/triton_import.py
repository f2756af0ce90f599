"""Triton where it is installed; elsewhere stand-ins, so that the eager implementations still import."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
except ImportError:  # Triton is a dependency on Linux only.
    triton = None
    INTERPRETED = False

    class _Language:
        constexpr = float

    tl = _Language()

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """Leave the function as it is: nothing calls it without Triton."""
        return function


def jit_unspecialised(*names: str) -> Callable[[Any], Any]:
    """As ``jit``, but compiling once for every value of these integers."""
    return jit if triton is None else triton.jit(do_not_specialize=list(names))


__all__ = ["INTERPRETED", "jit", "jit_unspecialised", "tl", "triton"]
