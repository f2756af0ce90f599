"""Ctrl-C and SIGTERM end a command, its workers and their cells, each of which saves what it has."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType

_asked: int | None = None
_cell: BaseProcess | None = None
_is_command = False
_parent_of_worker: int | None = None
_busy = False
_cells_save: Callable[[], bool] | None = None


def asked() -> int | None:
    """Number of the signal that asked this process to stop."""
    return _asked


def is_command() -> bool:
    """Whether this is the process that the user started, not one that a launcher did."""
    return _is_command


def take_signals_of_command() -> None:
    """Take Ctrl-C and SIGTERM in the process that the user started."""
    global _is_command
    _is_command = True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def take_signals_of_worker() -> None:
    """Leave Ctrl-C to the command, which passes it on as SIGTERM, and stop when the command is gone."""
    global _parent_of_worker
    if _parent_of_worker is not None:
        return
    _parent_of_worker = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=stop_without, args=(_parent_of_worker,), daemon=True).start()


def wait_for_cells(unfinished: Callable[[], bool]) -> None:
    """Let the command, which starts a multirun, wait after a signal until its workers' cells have saved.

    Args:
        unfinished: whether one of them has not.
    """
    global _cells_save
    _cells_save = unfinished


@contextmanager
def working() -> Iterator[None]:
    """While it lasts, a signal ends the job of a worker; at other times only no other is begun."""
    global _busy
    _busy = True
    try:
        yield
    finally:
        _busy = False


@contextmanager
def passed_on(cell: BaseProcess) -> Iterator[None]:
    """While it lasts, a first signal is passed on to ``cell``, so that it saves, a second one kills it."""
    global _cell
    _cell = cell
    try:
        if _asked is not None:
            cell.terminate()
        yield
    finally:
        _cell = None


def stop_without(parent: int) -> None:
    """Ask this process to stop as soon as ``parent``, the process that started it, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def leave_orphaned() -> None:
    """End this process if it is a worker that nobody waits for any longer."""
    if _parent_of_worker is not None and os.getppid() != _parent_of_worker:
        # The launcher's own code around the job would wait for ever, or complain.
        os._exit(128 + signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked
    again, _asked = _asked is not None, number
    if _cell is not None:
        if again:
            _cell.kill()
        else:
            _cell.terminate()
        return
    if _parent_of_worker is not None and not _busy:
        leave_orphaned()
        return
    if _is_command and not again:
        _stop_workers()
    if _is_command and not _busy and _cells_save is None:
        _leave(128 + number)
    sys.exit(128 + number)


def _leave(status: int) -> None:
    """End this process, which has nothing to save, where an exception would not always get through.

    OmegaConf, in whose code a command that only starts spends its time, has clauses that turn any exception
    at the wrong moment into an error of its own.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _stop_workers() -> None:
    """Stop the cells that workers run, and wait until they have saved."""
    workers = multiprocessing.active_children()
    if _cells_save is None or not workers:
        return
    print("\nstopping when the cells have saved; once more stops at once", file=sys.stderr)
    for worker in workers:
        worker.terminate()
    while multiprocessing.active_children() and _cells_save():
        time.sleep(0.1)
