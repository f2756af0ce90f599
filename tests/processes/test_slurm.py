"""What a job does after a signal of Slurm's, whose answers are given; launch/test_slurm.py has Slurm."""

from __future__ import annotations

import os
import signal

import pytest

from muse.errors import RunError
from muse.processes import slurm
from muse.training.interrupt import deferred_interrupt

RUNNING = {"JobId": "7", "JobState": "RUNNING", "Restarts": "1", "PreemptTime": "None"}
# Another job of the array that has the number of this one.
OTHER = {"JobId": "8", "ArrayJobId": "7", "JobState": "COMPLETING", "Restarts": "2", "PreemptTime": "None"}


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Lets a job that was queued again once before ask whether it is now, after SIGTERM."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    before = signal.getsignal(signal.SIGTERM)

    def run(told, handler=lambda number, frame: pytest.fail("queued again")):
        jobs = "\n".join(" ".join(f"{name}={value}" for name, value in job.items()) for job in (told, OTHER))
        scontrol = tmp_path / "scontrol"
        scontrol.write_text(f"#!/bin/sh\ncat <<END\n{jobs}\nEND\n")
        scontrol.chmod(0o755)
        monkeypatch.setattr(slurm, "_submitit_handler", handler)
        slurm.queue_again()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("told", [RUNNING, RUNNING | {"JobState": "COMPLETING"}, {}])
def test_a_job_that_somebody_ends_is_not_queued_again(ask, told):
    ask(told)


def test_a_job_that_slurm_queues_again_ends_without_a_result(ask):
    with pytest.raises(SystemExit) as ended:
        ask(RUNNING | {"JobState": "COMPLETING", "Restarts": "2"})
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_job_whose_place_is_taken_is_queued_again(ask):
    def end(number, frame):
        raise SystemExit(-1)

    with pytest.raises(SystemExit) as ended:
        ask(RUNNING | {"PreemptTime": "2026-11-28T17:58:33"}, end)
    assert ended.value.code == -1


def test_a_job_that_was_out_of_time_too_often_says_so(ask, monkeypatch):
    def refuse(number, frame):
        raise ValueError("Job not requeued because: timed-out too many times.")

    monkeypatch.setattr(slurm, "_warned", True)
    with pytest.raises(RunError, match="timed-out too many times"):
        ask(RUNNING, refuse)


def test_a_second_sigterm_stops_at_once(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with deferred_interrupt():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_sigterm_changes_nothing_in_a_job_of_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
