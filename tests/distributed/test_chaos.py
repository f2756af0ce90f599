"""Killed again and again, a run on two ranks ends with the bits of one that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed_helpers import (
    PATIENCE,
    Job,
    logged,
    options,
    read_json,
    run_folders,
    same_bits,
    stored,
    wait_for_step,
)

from muse.files import find_files
from muse.training.checkpoint import find_checkpoint, find_damage

# More than the kills before the last ones let a run make together: each lets it make some steps at most.
STEPS = 60
# What a run is doing when it is killed. The order is random, but what comes at the end is killed at the end.
MOMENTS = ["starting"] * 4 + ["resuming"] * 4 + ["training"] * 4 + ["saving"] * 5
LAST_MOMENTS = ["saving the last step", "ending", "ending"]
VICTIMS = ["", "RANK=0", "RANK=1"]


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

    def wait_for(self, pattern: str) -> None:
        """Wait for a file or folder of this job's run."""

        def found() -> bool:
            return any(any(run.glob(pattern)) for run in folders_of(self.root) if run not in self.before)

        deadline = time.monotonic() + PATIENCE
        while not found():
            assert self.job.alive(), f"the run ended before there was {pattern}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def wait_for_steps(self, steps: int) -> None:
        wait_for_step(self.job.alive, self.root, steps, self.before)

    def wait_before_steps(self, seconds: float) -> None:
        """Wait so long, but not beyond a first step."""
        deadline = time.monotonic() + seconds
        with suppress(AssertionError):
            wait_for_step(lambda: time.monotonic() < deadline, self.root, 1, self.before)

    def wait_for_moment(self, moment: str, start: float, generator: random.Random) -> None:
        """Wait for a random time in a part of a run, which takes ``start`` seconds to its first step."""
        if moment == "starting":
            self.wait_before_steps(generator.uniform(0, start))
        elif moment == "resuming":
            # Hydra makes the folder before anything is read or taken over.
            self.wait_for(".hydra")
            self.wait_before_steps(generator.uniform(0, start / 2))
        elif moment == "training":
            self.wait_for_steps(1)
            began, steps = time.monotonic(), generator.randint(1, 3)
            self.wait_for_steps(steps)
            time.sleep(generator.uniform(0, 2) * (time.monotonic() - began) / steps)
        elif moment == "saving":
            self.wait_for_steps(1)
            self.wait_for("checkpoints/.step_*.tmp")
            time.sleep(generator.uniform(0, 0.05))
        elif moment == "saving the last step":
            self.wait_for(f"checkpoints/.step_{STEPS:08d}.tmp")
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
        wait_for_step(job.alive, whole, 1)
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
        job = Job(place, run_options(place, root.name, together, asynchronous, "resume=auto"))
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
