"""Killed again and again, a run on two ranks ends with the bits of one that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from distributed_helpers import (
    Job,
    logged,
    options,
    read_json,
    run_folders,
    same_bits,
    stored,
    train_py,
    wait_for_step,
)

from muse.training.checkpoint import find_checkpoint, find_damage

KILLS = 10
# More than the rounds can make together: each is killed within seven steps.
STEPS = 60


def run_options(place: Path, root: str, *more: str) -> list[str]:
    periods = [f"train.steps={STEPS}", "train.eval_every=15", "train.checkpoint_every=1"]
    return options(place, root, "ddp", *periods, *more)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    ranks = train_py(2, place, run_options(place, "undisturbed"))
    assert ranks.wait() == [0, 0], ranks.err()
    return run_folders(place / "undisturbed")[0]


def kill_within_a_few_steps(job: Job, root: Path, generator: random.Random) -> None:
    """Kill one rank or all processes of a job at a random moment of its training, writing included."""
    before = run_folders(root)

    def alive() -> bool:
        return job.process.poll() is None

    wait_for_step(alive, root, 1, before)
    began, steps = time.monotonic(), generator.randint(1, 3)
    wait_for_step(alive, root, steps, before)
    pace = (time.monotonic() - began) / steps
    time.sleep(generator.uniform(0, 2) * pace)
    job.kill(generator.choice(["", "RANK=0", "RANK=1"]))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(place, undisturbed, asynchronous):
    generator = random.Random(f"asynchronous={asynchronous}")
    root = place / f"killed {asynchronous}"
    arguments = run_options(place, root.name, f"train.async_checkpoint={asynchronous}", "resume=auto")
    for kills in range(1, KILLS + 1):
        job = Job(place, arguments)
        try:
            kill_within_a_few_steps(job, root, generator)
        finally:
            status, _, err = job.finish()
        assert status in (1, -signal.SIGKILL), err
        runs = run_folders(root)
        assert len(runs) == kills
        checkpoint = find_checkpoint(runs[-1])
        assert checkpoint is None or find_damage(checkpoint) is None
    ranks = train_py(2, place, arguments)
    assert ranks.wait() == [0, 0], ranks.err()
    assert "resuming" in ranks.out()[0]
    run = run_folders(root)[-1]
    assert same_bits(stored(find_checkpoint(run)), stored(find_checkpoint(undisturbed)))
    assert logged(run) == logged(undisturbed)
    assert read_json(run / "result.json")["valid"] == read_json(undisturbed / "result.json")["valid"]
