"""Waiting for what happens, however long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Seconds after which something hangs rather than works, on any machine and beside any load.
PATIENCE = 900


def wait_until(happens: Callable[[], T], while_: Callable[[], bool] = lambda: True) -> T:
    """What ``happens`` returns, once that is true; it fails when ``while_`` no longer is."""
    deadline = time.monotonic() + PATIENCE
    while True:
        # In this order: what happened last is seen, too.
        goes_on = while_()
        if found := happens():
            return found
        assert goes_on, "it ended too early"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.005)
