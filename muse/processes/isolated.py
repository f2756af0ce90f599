"""A job in a process of its own: no threads, compiled code, memory or crash passes from one to the next."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from muse.errors import ConfigError, RunError
from muse.processes import signals

T = TypeVar("T")


def run_isolated(job: Callable[..., T], *arguments: Any) -> T:
    """Run ``job(*arguments)`` in a process of its own and return what it returns.

    A signal that asks this process to stop is passed on once, so that the job can save what it has; the
    second one kills the job.

    Raises:
        ConfigError, RunError: what the job raised.
        RunError: when the process was killed, or ended by an error that is shown with its trace.
        SystemExit: a signal asked this process to stop, and the job ended without a result.
    """
    # A new process is told the default too, and the default of joblib's workers is known to them alone.
    multiprocessing.set_start_method("spawn", force=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_work, args=(sender, os.getpid(), job, arguments))
    # Ctrl-C reaches the whole group; the new process leaves it before it takes signals of its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sender.close()
    with signals.forwarded_to(process):
        # Not the end of the process first: it would wait for a reader of what is too long for the pipe.
        wait([receiver, process.sentinel])
        found: tuple[bool, Any] | None = None
        # The pipe of a process that ended without a word is at its end.
        with suppress(EOFError):
            found = receiver.recv() if receiver.poll() else None
        process.join()
    if found is not None:
        ended_well, value = found
        if ended_well:
            return cast(T, value)
        raise value
    status = process.exitcode or 0
    if signals.received() is not None:
        sys.exit(128 - status if status < 0 else status)
    if status < 0:
        raise RunError(f"the process was killed by signal {-status}, perhaps for lack of memory")
    raise RunError(f"the process ended with status {status}")


def _work(sender: Connection, parent: int, job: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=signals.terminate_when_orphaned, args=(parent,), daemon=True).start()
    # As Hydra shows it in its own process.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    try:
        sender.send((True, job(*arguments)))
    except (ConfigError, RunError) as error:
        sender.send((False, error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a job that breaks must not end the sweep
        traceback.print_exc()
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        sender.send((False, RunError(f"{type(error).__name__}: {reason}")))
