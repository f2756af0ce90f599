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


__all__ = ["INTERPRETED", "jit", "tl", "triton"]
