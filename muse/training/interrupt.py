"""Ctrl-C and SIGTERM end a run between two steps, after its state is saved."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from muse.processes.torchrun import launched_rank


@dataclass
class Interrupt:
    """The signal that asked for the end, if one did."""

    signal: int | None = None


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Record SIGINT and SIGTERM instead of stopping; a second one stops at once.

    Of several ranks, which are all sent the signal, the first one says so.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is not None:
            raise KeyboardInterrupt
        interrupt.signal = number
        if launched_rank() == 0:
            print("\nstopping after this step; once more stops at once", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
