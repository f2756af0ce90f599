"""Sweeps as a user runs them: through Hydra's launchers and sweepers, in processes of their own."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.commands import commands_here
from support.processes import ROOT, Copies, be_command, keep_cells
from support.sweeps import (
    HELD,
    STEPS,
    TWO,
    options,
    outcomes,
    start,
    summary,
    sweep,
    sweeps,
    wait_for_steps,
    wait_until_alone,
    weights,
)
from support.waiting import PATIENCE

from muse.files import find_files


@pytest.fixture
def sweep_here(monkeypatch, capfd, place):
    """A sweep in this process, with all of its cells."""
    command = commands_here(monkeypatch, place)

    def run(root: str, *arguments: str) -> tuple[int, str, str]:
        status = command("train.py", ["-m", *options(place, root), *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err, err
        return status, out, err

    return run


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """A sweep of two cells at a time."""
    status, out, err = sweep(place, "whole", *TWO, "hydra/launcher=processes")
    assert status == 0, err
    (folder,) = sweeps(place, "whole")
    assert out.count("tokens_per_second") == 1
    assert f"the sweep is in {folder}" in out
    return folder


@pytest.mark.slow
def test_no_cell_of_a_parallel_sweep_is_lost(tmp_path, undisturbed):
    cells = summary(undisturbed)
    assert outcomes(undisturbed, "seed") == [(seed, "trained") for seed in ("0", "1")]
    for cell in cells:
        result = json.loads((undisturbed / cell["folder"] / "result.json").read_text())
        # Relative, so that a sweep that is moved is whole.
        assert cell["folder"] == f"{cell['options']['seed']}-stage1-tiny"
        assert result["seed"] == int(cell["options"]["seed"])
        assert cell["valid_loss"] == result["valid"]["loss"]
        assert cell["valid_ppl"] == result["valid"]["ppl"]
        assert cell["seconds"] == result["seconds"] > 0
        assert cell["tokens_per_second"] > 0
        assert cell["parameters"] == result["parameters"]
        assert cell["steps"] == STEPS
    rows = list(csv.DictReader((undisturbed / "summary.csv").read_text().splitlines()))
    assert [(row["seed"], float(row["valid_loss"])) for row in rows] == [
        (cell["options"]["seed"], cell["valid_loss"]) for cell in cells
    ]
    assert (undisturbed / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(weights(undisturbed, tmp_path))) == 2


@pytest.mark.slow
def test_a_repeated_sweep_trains_nothing(place, undisturbed, sweep_here):
    before = summary(undisturbed)
    status, out, err = sweep_here("whole", *TWO)
    assert status == 0, err
    again = sweeps(place, "whole")[-1]
    assert again != undisturbed
    assert out.count("is finished; its results are in") == 2
    after = summary(again)
    for cell, own in zip(after, before, strict=True):
        assert (again / cell.pop("folder")).samefile(undisturbed / own.pop("folder"))
    assert after == [{**cell, "status": "reused"} for cell in before]
    assert find_files(again, "metrics.jsonl") == []


@pytest.mark.slow
def test_cells_that_differ_in_their_hardware_are_all_trained(place, sweep_here):
    status, _, err = sweep_here("hardware", "hardware.threads=1,2", "train.steps=2", "resume=auto")
    assert status == 0, err
    (folder,) = sweeps(place, "hardware")
    assert outcomes(folder, "hardware.threads") == [("1", "trained"), ("2", "trained")]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_a_sweep_that_is_killed_and_repeated_ends_with_the_same_bits(place, undisturbed, launcher):
    root = f"killed {launcher}"
    (place / "held").mkdir(exist_ok=True)
    (place / "held" / "sitecustomize.py").write_text(HELD.format(steps=6))
    path = f"{place / 'held'}{os.pathsep}{ROOT}"
    process = start(place, root, *TWO, f"hydra/launcher={launcher}", PYTHONPATH=path)
    wait_for_steps(process, place / root, 6, 1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    wait_until_alone(place / root)
    assert {cell["status"] for cell in summary(sweeps(place, root)[-1])} <= {"unfinished", "interrupted"}
    arguments = ["-m", *options(place, root), *TWO]
    again = Copies(place / "output" / launcher, [{}], be_command, "train.py", arguments, place, keep_cells)
    assert again.wait() == [0], again.err()
    assert "resuming" in again.out()[0]
    cells = summary(sweeps(place, root)[-1])
    assert [cell["status"] for cell in cells] == ["trained"] * 2
    assert weights(sweeps(place, root)[-1], place) == weights(undisturbed, place)
    assert [cell["valid_loss"] for cell in cells] == [cell["valid_loss"] for cell in summary(undisturbed)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "at_once"),
    [("processes", signal.SIGTERM, 2), ("basic", signal.SIGINT, 1)],
)
def test_a_signal_ends_the_workers_after_their_cells_have_saved(place, launcher, number, at_once):
    root = f"stopped {launcher} {number}"
    process = start(
        place,
        root,
        "seed=0,1,2",
        "train.steps=1000000",
        "train.checkpoint_every=0",
        f"hydra/launcher={launcher}",
    )
    wait_for_steps(process, place / root, 2, at_once)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in out + err
    assert out.count("is saved, resume=auto") == at_once
    (folder,) = sweeps(place, root)
    assert [cell["status"] for cell in summary(folder)] == ["interrupted"] * at_once
    assert len(find_files(folder, "state.pt")) == at_once
    wait_until_alone(place / root)


@pytest.mark.slow
def test_a_cell_that_fails_is_in_the_summary_and_the_others_run(place):
    """One learning rate is refused before the cell's process starts, one makes its training diverge."""
    arguments = ["optim.lr=-1,1e30,0.01", "optim.warmup=0", "train.steps=3", "hydra/launcher=processes"]
    status, out, err = sweep(place, "failed", *arguments)
    assert status == 1
    (folder,) = sweeps(place, "failed")
    assert outcomes(folder, "optim.lr") == [("-1", "failed"), ("1e+30", "failed"), ("0.01", "trained")]
    refused, diverged, _ = summary(folder)
    assert refused["error"].startswith("optim.lr=-1")
    assert "is not finite in step 2" in diverged["error"]
    for cell in (refused, diverged):
        assert f"error: {cell['error']}\n" in err
        assert f"{cell['options']['optim.lr']}: {cell['error']}\n" in out


@pytest.mark.slow
def test_optuna_finds_the_best_of_its_trials_and_goes_on_with_its_study(place, sweep_here):
    """A trial that diverges counts as infinitely bad."""
    arguments = ["hydra/sweeper=search", "optim.lr=choice(0.03,1e30)", "optim.warmup=0", "train.steps=3"]
    trials = ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=2"]
    status, _, err = sweep_here("search", *arguments, *trials)
    assert status == 1, err
    (folder,) = sweeps(place, "search")
    cells = summary(folder)
    losses = {cell["options"]["optim.weight_decay"]: cell.get("valid_loss") for cell in cells}
    found = [loss for loss in losses.values() if loss is not None]
    assert 0 < len(found) < len(losses) == 3, "both learning rates must be tried"
    searched = json.loads((folder / "search.json").read_text())
    assert searched == {"optim.lr": False, "optim.weight_decay": False}
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert {cell["status"] for cell in cells if "valid_loss" not in cell} == {"failed"}
    storage = f"sqlite:///{place / 'search' / 'optuna.db'}"
    (told,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(told.study_name, storage)
    assert study.best_value == min(found)
    assert losses[str(study.best_params["optim.weight_decay"])] == min(found)
    assert sorted(trial.value for trial in study.trials)[-1] == float("inf")

    # The same options search on in the same study, others have one of their own.
    sweep_here("search", *arguments, "hydra.sweeper.n_trials=1", "logger.log_every=2")
    assert [len(known.trials) for known in studies(storage)] == [4]
    status, _, err = sweep_here(
        "search", "hydra/sweeper=search", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2",
        "train.steps=2",
    )  # fmt: skip
    assert status == 0, err
    last = summary(sweeps(place, "search")[-1])
    (own,) = [known for known in studies(storage) if len(known.trials) == 2]
    assert own.best_value == min(cell["valid_loss"] for cell in last)
    assert set(own.best_params) == {"optim.lr", "optim.warmup", "optim.weight_decay"}
    assert all(0.0003 <= float(cell["options"]["optim.lr"]) <= 0.03 for cell in last)


def studies(storage: str) -> list[Any]:
    return [optuna.load_study(told.study_name, storage) for told in optuna.get_all_study_summaries(storage)]


SBATCH = """#!{python}
# As Slurm's: takes a script, runs it for each task of its array, and tells the number of the job at once.
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1]).read_text()
pathlib.Path("{folder}/script.sh").write_text(script)
last = int(re.search(r"--array=0-(\\d+)", script)[1])
for task in range(last + 1):
    known = dict(SLURM_JOB_ID=str(8 + task), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task),
        SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0",
        SLURM_CPUS_PER_TASK="1", SLURM_JOB_NODELIST="here")
    subprocess.Popen(["bash", sys.argv[-1]], env=dict(os.environ, **known), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!{python}
# As Slurm's: runs what comes after the options.
import os, sys
command = sys.argv[next(n for n, word in enumerate(sys.argv) if "python" in os.path.basename(word) and n):]
os.execv(command[0], command)
"""


@pytest.mark.slow
def test_cells_run_through_slurm(place, tmp_path):
    """Slurm itself is played by two scripts; test_slurm.py has a real one where it is installed."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tmp_path / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    status, _, err = sweep(
        place, "slurm", "seed=0,1", "train.steps=2", "hydra/launcher=slurm", "hydra.launcher.partition=fast",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    assert status == 0, err
    (folder,) = sweeps(place, "slurm")
    assert outcomes(folder, "seed") == [("0", "trained"), ("1", "trained")]
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "--array=0-1%2",
        "--gpus-per-node=1",
        "--cpus-per-task=8",
        "--partition=fast",
        "--time=240",
        "--requeue",
        "--signal=USR2@300",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "\nexport OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK\n" in script
