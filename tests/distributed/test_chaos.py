"""Killed again and again, a run on two ranks ends with the bits of one that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed_helpers import (
    Job,
    logged,
    options,
    read_json,
    run_folders,
    same_bits,
    script,
    stored,
    wait_for_steps,
)
from waiting import wait_until

from muse.files import find_files
from muse.processes.torchrun import launched_rank
from muse.report.metrics import MetricsLog
from muse.runs.checkpoints import find_checkpoint, find_damage
from muse.training import run as train_run
from muse.training.checkpoint import CheckpointWriter

# More than the kills before the last ones let a run make together.
STEPS = 60
# What a run is doing when it is killed, and how many lines it may log before it waits for that. The order is
# random, but what comes at the end is killed at the end.
MOMENTS = ["starting"] * 4 + ["resuming"] * 4 + ["training"] * 4 + ["saving"] * 5
LAST_MOMENTS = ["saving the last step", "ending", "ending"]
LINES = {"starting": 1, "resuming": 1, "training": 6, "saving": 4}
# Has a character for every line that a run has logged itself.
LOGGED = "logged"
VICTIMS = ["", "RANK=0", "RANK=1"]


def hold_back(lines: int) -> None:
    """Let the first rank tell what it does, log no more lines, and never end, so that it can be killed."""
    log, save, write = MetricsLog.__call__, CheckpointWriter.save, train_run.write_json

    def wait_to_be_killed() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            signal.pause()

    def log_and_tell(self: MetricsLog, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        with open(self._path.with_name(LOGGED), "a", encoding="utf-8") as file:
            file.write(".")
        if self._path.with_name(LOGGED).stat().st_size >= lines:
            wait_to_be_killed()

    def tell_and_save(self: CheckpointWriter, tensors: Any, state: Any, best: bool) -> None:
        (self.folder.parent / f"saving {state.step}").touch()
        save(self, tensors, state, best)

    def write_no_result(path: Path, value: Any) -> None:
        if path.name == train_run.RESULT_FILE:
            wait_to_be_killed()
        write(path, value)

    if launched_rank() == 0:
        MetricsLog.__call__, CheckpointWriter.save = log_and_tell, tell_and_save
        train_run.write_json = write_no_result


def run_options(place: Path, root: str, together: str, *more: str) -> list[str]:
    periods = [f"train.steps={STEPS}", "train.eval_every=15", "train.checkpoint_every=1"]
    return options(place, root, together, *periods, *more)


def folders_of(root: Path) -> list[Path]:
    """Folders of all runs, also of those that ended before they had anything."""
    return list(root.glob("train/*/*"))


@dataclass
class Watch:
    """A job, and the folders of runs that were there before it."""

    job: Job
    root: Path
    before: list[Path]

    def found(self, pattern: str) -> list[Path]:
        """What this job's run has of a file or folder."""
        runs = [run for run in folders_of(self.root) if run not in self.before]
        return [path for run in runs for path in run.glob(pattern)]

    def wait_for(self, pattern: str) -> None:
        """Wait for a file or folder of this job's run."""
        wait_until(lambda: self.found(pattern), self.job.alive)

    def logged(self) -> int:
        """Lines that this job has logged."""
        return sum(path.stat().st_size for path in self.found(LOGGED))

    def wait_for_lines(self, lines: int) -> None:
        wait_until(lambda: self.logged() >= lines, self.job.alive)

    def wait_before_lines(self, seconds: float) -> None:
        """Wait so long, but not beyond a first line."""
        end = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() >= end or self.logged(), self.job.alive)

    def wait_for_moment(self, moment: str, start: float, generator: random.Random) -> None:
        """Wait for a random time in a part of a run, which takes ``start`` seconds to its first step.

        The test holds at whatever time that then is.
        """
        if moment == "starting":
            self.wait_before_lines(generator.uniform(0, start))
        elif moment == "resuming":
            # Hydra makes the folder before anything is read or taken over.
            self.wait_for(".hydra")
            self.wait_before_lines(generator.uniform(0, start / 2))
        elif moment == "training":
            self.wait_for_lines(1)
            began, lines = time.monotonic(), generator.randint(1, 3)
            self.wait_for_lines(1 + lines)
            time.sleep(generator.uniform(0, 2) * (time.monotonic() - began) / lines)
        elif moment == "saving":
            self.wait_for_lines(1)
            self.wait_for("saving *")
            time.sleep(generator.uniform(0, 0.05))
        elif moment == "saving the last step":
            self.wait_for(f"saving {STEPS}")
            time.sleep(generator.uniform(0, 0.05))
        else:
            self.wait_for(f"checkpoints/step_{STEPS:08d}")
            time.sleep(generator.uniform(0, 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(place, together):
    whole, root = place / f"undisturbed {together}", place / f"killed {together}"
    job, began = Job(place, run_options(place, whole.name, together)), time.monotonic()
    try:
        wait_for_steps(job.alive, whole, 1)
        start = time.monotonic() - began
    finally:
        status, _, err = job.finish()
    assert status == 0, err
    (undisturbed,) = run_folders(whole)

    generator = random.Random(together)
    moments = [*generator.sample(MOMENTS, len(MOMENTS)), *LAST_MOMENTS]
    assert len(moments) == 20
    for moment in moments:
        # How checkpoints are written may change from one part of a run to the next.
        asynchronous = f"train.async_checkpoint={generator.choice(['false', 'true'])}"
        before = folders_of(root)
        arguments = run_options(place, root.name, together, asynchronous, "resume=auto")
        job = Job(place, arguments, script(place, hold_back, LINES.get(moment, 10 * STEPS)))
        try:
            Watch(job, root, before).wait_for_moment(moment, start, generator)
            job.kill(generator.choice(VICTIMS))
        finally:
            status, _, err = job.finish()
        assert status in (1, -signal.SIGKILL), err
        assert find_files(root, "result.json") == []
        for which in ("last", "best"):
            kept = [find_checkpoint(run, which) for run in folders_of(root)]
            assert all(find_damage(path) is None for path in kept if path is not None)
    job = Job(place, run_options(place, root.name, together, "resume=auto"))
    status, out, err = job.finish()
    assert status == 0, err
    assert "resuming" in out
    run = run_folders(root)[-1]
    for which in ("last", "best"):
        end, expected = find_checkpoint(run, which), find_checkpoint(undisturbed, which)
        assert end.name == expected.name
        assert same_bits(stored(end), stored(expected))
    assert logged(run) == logged(undisturbed)
    assert read_json(run / "result.json")["valid"] == read_json(undisturbed / "result.json")["valid"]
