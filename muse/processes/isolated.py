"""A job in a fresh process: no threads, compiled code, memory or crash passes from one to the next."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from muse.errors import ConfigError, RunError
from muse.processes import signals


def run_apart(job: Callable[..., int], *arguments: Any) -> int:
    """Run ``job(*arguments)`` in a fresh process and return its exit status.

    A signal that asks this process to stop is passed on once, so that the job can save what it has; the
    second one kills the job.

    Raises:
        ConfigError, RunError: what the job raised.
        RunError: when the process was killed, or ended by an error that is shown with its trace.
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
    with signals.passed_on(process):
        # Not the end of the process first: it would wait for a reader of what is too long for the pipe.
        wait([receiver, process.sentinel])
        try:
            error = receiver.recv() if receiver.poll() else None
        except EOFError:
            error = None
        process.join()
    status = process.exitcode or 0
    if isinstance(error, Exception):
        raise error
    if signals.asked() is None and status < 0:
        raise RunError(f"the process was killed by signal {-status}, perhaps for lack of memory")
    if signals.asked() is None and 0 < status < 128:
        raise RunError(f"the process ended with status {status}")
    return 128 - status if status < 0 else status


def _work(sender: Connection, parent: int, job: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=signals.stop_without, args=(parent,), daemon=True).start()
    # As Hydra shows it in its own process.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    try:
        status = job(*arguments)
    except (ConfigError, RunError) as error:
        sender.send(error)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:  # noqa: BLE001 - a cell that breaks must not end the sweep
        traceback.print_exc()
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        sender.send(RunError(f"{type(error).__name__}: {reason}"))
        status = 1
    sys.exit(status)
