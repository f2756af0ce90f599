"""Ctrl-C and SIGTERM end a run between two steps, after its state is saved."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from muse.processes.slurm import in_slurm
from muse.processes.torchrun import launched_rank


@dataclass
class Interrupt:
    """The signal that asked for the end, if one did."""

    signal: int | None = None


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Record SIGINT and SIGTERM instead of stopping; a second one stops at once.

    In a job of Slurm's only SIGINT does: SIGTERM goes to all processes there, torchrun passes it to its ranks
    once more, and it comes again when the time of grace is over. Of several ranks, which are all sent the
    signal, the first one says so.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is None:
            interrupt.signal = number
            if launched_rank() == 0:
                again = "" if in_slurm() else "; once more stops at once"
                print(f"\nstopping after this step{again}", file=sys.stderr)
        elif number == signal.SIGINT or not in_slurm():
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
