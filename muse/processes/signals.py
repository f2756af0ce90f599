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

_received: int | None = None
_child: BaseProcess | None = None
_is_command = False
_worker_parent: int | None = None
_job_running = False
_cells_unfinished: Callable[[], bool] | None = None


def received() -> int | None:
    """Number of the signal that asked this process to stop."""
    return _received


def is_command() -> bool:
    """Whether this is the process that the user started, not one that a launcher did."""
    return _is_command


def install_command_handlers() -> None:
    """Handle Ctrl-C and SIGTERM in the process that the user started."""
    global _is_command
    _is_command = True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def install_worker_handlers() -> None:
    """Leave Ctrl-C to the command, which passes it on as SIGTERM, and stop when the command is gone."""
    global _worker_parent
    if _worker_parent is not None:
        return
    _worker_parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _handle)
    threading.Thread(target=terminate_when_orphaned, args=(_worker_parent,), daemon=True).start()


def wait_for_cells(unfinished: Callable[[], bool]) -> None:
    """Let the command, which starts a multirun, wait after a signal until its workers' cells have saved.

    Args:
        unfinished: whether one of them has not.
    """
    global _cells_unfinished
    _cells_unfinished = unfinished


@contextmanager
def job_running() -> Iterator[None]:
    """While it lasts, a signal ends the job of a worker; at other times only no other is begun."""
    global _job_running
    _job_running = True
    try:
        yield
    finally:
        _job_running = False


@contextmanager
def forwarded_to(process: BaseProcess) -> Iterator[None]:
    """While it lasts, a first signal is passed on to ``process``, so that it saves, a second one kills it."""
    global _child
    _child = process
    try:
        if _received is not None:
            process.terminate()
        yield
    finally:
        _child = None


def terminate_when_orphaned(parent: int) -> None:
    """Ask this process to stop as soon as ``parent``, the process that started it, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def exit_if_orphaned() -> None:
    """End this process if it is a worker that nobody waits for any longer."""
    if _worker_parent is not None and os.getppid() != _worker_parent:
        # The launcher's own code around the job would wait for ever, or complain.
        os._exit(128 + signal.SIGTERM)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    again, _received = _received is not None, number
    if _child is not None:
        if again:
            _child.kill()
        else:
            _child.terminate()
        return
    if _worker_parent is not None and not _job_running:
        exit_if_orphaned()
        return
    if _is_command and not again:
        _terminate_workers()
    if _is_command and not _job_running and _cells_unfinished is None:
        _exit_now(128 + number)
    sys.exit(128 + number)


def _exit_now(status: int) -> None:
    """End this process, which has nothing to save, where an exception would not always get through.

    OmegaConf, in whose code a command that only starts spends its time, has clauses that turn any exception
    at the wrong moment into an error of its own.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _terminate_workers() -> None:
    """Stop the cells that workers run, and wait until they have saved."""
    workers = multiprocessing.active_children()
    if _cells_unfinished is None or not workers:
        return
    print("\nstopping when the cells have saved; once more stops at once", file=sys.stderr)
    for worker in workers:
        worker.terminate()
    while multiprocessing.active_children() and _cells_unfinished():
        time.sleep(0.1)
