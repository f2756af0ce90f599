"""A cell that is a job of Slurm: it saves before it is queued again, where submitit would end it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from muse.errors import RunError

_submitit_handler: Callable[[int, FrameType | None], Any] | None = None
_warned = False


def in_slurm() -> bool:
    """Whether this process is of a job of Slurm's."""
    return "SLURM_JOB_ID" in os.environ


def install_slurm_handler() -> None:
    """Take the signal before a job's time is over as SIGTERM; submitit answers it in ``queue_again``."""
    global _submitit_handler
    handler = signal.getsignal(signal.SIGUSR2)
    if in_slurm() and callable(handler):
        _submitit_handler = handler
        signal.signal(signal.SIGUSR2, _handle_warning)


def _handle_warning(number: int, frame: FrameType | None) -> None:
    global _warned
    _warned = True
    signal.raise_signal(signal.SIGTERM)


def queue_again() -> None:
    """End this process, which a signal told to stop and which has saved, if Slurm is to run its job again.

    That is where the job's time is over, a more urgent one takes its place, or somebody has queued it again.
    After ``scancel`` nothing happens. The process ends without a result, so that the command waits on.

    Raises:
        SystemExit: the job is queued again.
        RunError: it is not, because its time was over too often.
    """
    if _submitit_handler is None:
        return
    # It comes again to all processes of a job that is queued again, and would end scontrol.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _warned:
        job = job_fields(os.environ["SLURM_JOB_ID"])
        if int(job.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            sys.exit(128 + signal.SIGTERM)
        # Slurm itself queues again only what has not ended by itself when its time of grace is over.
        if job.get("JobState") != "RUNNING" or job.get("PreemptTime", "None") == "None":
            return
    try:
        _submitit_handler(signal.SIGUSR2, None)
    except Exception as error:
        raise RunError(str(error)) from error


def job_fields(job: str) -> dict[str, str]:
    """What Slurm tells of the job of this number, as ``JobState``; nothing where it does not answer."""
    try:
        told = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return {}
    # One job of an array has the array's number, and by that Slurm tells of all of them.
    jobs = (dict(word.split("=", 1) for word in line.split() if "=" in word) for line in told.splitlines())
    return next((fields for fields in jobs if fields.get("JobId") == job), {})
