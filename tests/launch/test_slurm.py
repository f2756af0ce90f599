"""Sweeps and trainings that a real Slurm runs, on one node that the tests start themselves."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from support import distributed
from support.distributed import train_py
from support.processes import ROOT, environment_apart
from support.runs import logged, read_json, run_folders, same, stored
from support.slurm import MISSING, Slurm, one_node_slurm
from support.sweeps import HELD, STEPS, TWO, outcomes, start, summary, sweep, sweeps, wait_for_steps, weights
from support.waiting import PATIENCE, wait_until

from muse.files import find_files
from muse.processes.slurm import job_fields
from muse.runs.checkpoints import find_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"{', '.join(MISSING)} are not here; Debian's slurm-wlm and munge bring them"
    ),
]
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.partition=usual", "hydra.launcher.cpus_per_task=1"]
HELD_STEP = 6


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """A sweep without Slurm."""
    status, _, err = sweep(place, "whole", *TWO)
    assert status == 0, err
    return sweeps(place, "whole")[0]


@pytest.fixture(scope="module")
def held(place: Path) -> dict[str, str]:
    """An environment in which a training waits after some steps until it is sent a signal."""
    (place / "held").mkdir()
    (place / "held" / "sitecustomize.py").write_text(HELD.format(steps=HELD_STEP))
    return {"PYTHONPATH": f"{place / 'held'}{os.pathsep}{ROOT}"}


def array_of(folder: Path) -> list[str]:
    """Ids of the jobs of a sweep."""
    return sorted(path.name for path in (folder / ".submitit").glob("[0-9]*_*"))


def resumed_steps(folder: Path) -> list[str]:
    """After which step each part of a cell of a sweep went on."""
    logs = sorted((folder / ".submitit").glob("*/*_log.out"))
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line.rpartition(" ")[2] for line in lines if line.startswith("resuming ")]


def test_the_cells_of_a_sweep_are_the_jobs_of_an_array(place, slurm, monkeypatch):
    options = ["seed=0,1", "optim.lr=0.01,0.02", "train.steps=2"]
    status, out, err = sweep(place, "array", *options, *LAUNCHER, **slurm.environment)
    assert status == 0, err
    (folder,) = sweeps(place, "array")
    assert outcomes(folder, "seed") == [(seed, "trained") for seed in "0011"]
    assert outcomes(folder, "optim.lr") == [(rate, "trained") for rate in ("0.01", "0.02") * 2]
    assert out.count("tokens_per_second") == 1
    jobs = [slurm.job(job) for job in array_of(folder)]
    assert len({job["ArrayJobId"] for job in jobs}) == 1
    assert [job["ArrayTaskId"] for job in jobs] == list("0123")
    # Each is told apart, also the one whose number is the array's.
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    assert [job_fields(job["JobId"])["ArrayTaskId"] for job in jobs] == list("0123")
    # What the launcher asks for.
    assert {(job["TresPerNode"], job["MinMemoryNode"]) for job in jobs} == {("gres:gpu:1", "64G")}
    assert {job["TimeLimit"] for job in jobs} == {"04:00:00"}


def preempt(slurm: Slurm, jobs: list[str]) -> None:
    """Let a job take the whole node."""
    slurm(
        "sbatch", "--partition=urgent", "--cpus-per-task=64", "--mem=1", "--output=/dev/null", "--wrap=true"
    )


def queue_again(slurm: Slurm, jobs: list[str]) -> None:
    for job in jobs:
        slurm("scontrol", "requeue", job)


def warn(slurm: Slurm, jobs: list[str]) -> None:
    """Send what Slurm sends before the time is over."""
    for job in jobs:
        slurm("scancel", "--signal=USR2", job)


@pytest.mark.parametrize("end", [preempt, queue_again, warn])
def test_cells_that_slurm_queues_again_save_and_end_with_the_same_bits(place, slurm, undisturbed, held, end):
    root = end.__name__
    process = start(place, root, *TWO, *LAUNCHER, **slurm.environment, **held)
    try:
        wait_for_steps(process, place / root, HELD_STEP, 2)
        (folder,) = sweeps(place, root)
        end(slurm, array_of(folder))
        # The command waits until the jobs have run again.
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert [cell["status"] for cell in summary(folder)] == ["trained"] * 2
    assert [int(slurm.job(job)["Restarts"]) for job in array_of(folder)] == [1, 1]
    steps = resumed_steps(folder)
    assert len(steps) == 2
    assert {int(step) for step in steps} <= {HELD_STEP, HELD_STEP + 1}
    assert weights(folder, place) == weights(undisturbed, place)
    assert [cell["valid_loss"] for cell in summary(folder)] == [
        cell["valid_loss"] for cell in summary(undisturbed)
    ]


def test_cells_that_are_cancelled_save_and_are_not_queued_again(place, slurm, held):
    process = start(place, "cancelled", *TWO, *LAUNCHER, **slurm.environment, **held)
    try:
        wait_for_steps(process, place / "cancelled", HELD_STEP, 2)
        (folder,) = sweeps(place, "cancelled")
        jobs = array_of(folder)
        slurm("scancel", *jobs)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "Traceback" not in out + err
    assert [cell["status"] for cell in summary(folder)] == ["interrupted"] * 2
    assert len(find_files(folder, "state.pt")) >= 2
    wait_until(lambda: not set(jobs) & set(slurm.jobs()))
    assert {slurm.job(job)["JobState"] for job in jobs} == {"CANCELLED"}


def ranks_by_srun(place: Path, arguments: list[str]) -> Path:
    """A script for sbatch that trains on two ranks."""
    torchrun = ["srun", sys.executable, "-m", "muse.torchrun", "--standalone", "--nproc-per-node=2"]
    script = place / "ranks.sh"
    script.write_text(f"#!/bin/sh\n{shlex.join([*torchrun, str(ROOT / 'train.py'), *arguments])}\n")
    return script


@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_two_ranks_that_are_cancelled_save_and_go_on_in_another_job(place, slurm, held, together):
    def options(root: str) -> list[str]:
        periods = [f"train.steps={STEPS}", "train.eval_every=0", "train.checkpoint_every=0"]
        return distributed.options(place, root, together, *periods, "resume=auto")

    ranks = train_py(2, place, options(f"ranks {together}"))
    root = place / f"cancelled {together}"
    output = place / f"{together}.txt"
    submit = [
        "sbatch",
        "--parsable",
        "--mem=1",
        "--cpus-per-task=2",
        "--open-mode=append",
        f"--output={output}",
    ]
    submit.append(str(ranks_by_srun(place, options(root.name))))
    job = slurm(*submit, **(environment_apart() | held)).strip()

    distributed.wait_for_steps(lambda: job in slurm.jobs(), root, HELD_STEP)
    slurm("scancel", job)
    wait_until(lambda: job not in slurm.jobs())
    (run,) = run_folders(root)
    saved = find_checkpoint(run)
    assert saved is not None, output.read_text()
    assert saved.name == f"step_{logged(run)[-1]['step']:08d}"
    other = slurm(*submit, **environment_apart()).strip()
    wait_until(lambda: other not in slurm.jobs())
    assert slurm.job(other)["JobState"] == "COMPLETED", output.read_text()
    assert ranks.wait() == [0, 0], ranks.err()
    (undisturbed,) = run_folders(place / f"ranks {together}")
    run = run_folders(root)[-1]
    assert same(stored(find_checkpoint(run)), stored(find_checkpoint(undisturbed)))
    assert logged(run) == logged(undisturbed)
    assert read_json(run / "result.json")["valid"] == read_json(undisturbed / "result.json")["valid"]
