"""train.py as a user runs it: in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from support.configs import run_options
from support.pictures import save_blank
from support.processes import ROOT, Copies, be_command, environment_apart, keep_cells
from support.runs import errors, logged, read_json, run_folders, same, stored
from support.waiting import PATIENCE, wait_until

import muse
from muse.files import find_files
from muse.measure import matrix_products
from muse.report.metrics import MetricsLog
from muse.runs.checkpoints import find_checkpoint, find_sound_checkpoint

STEPS = 36
EVALUATIONS = [12, 24, 36]


def options(place: Path, root: str) -> list[str]:
    """A very small run that logs every step."""
    periods = [f"train.steps={STEPS}", "train.eval_every=12", "train.checkpoint_every=3"]
    return ["stage=1", *run_options(place, root), *periods, "train.sample_tokens=4"]


def hold(steps: int, told: Path) -> None:
    """Let a run tell its folder after so many of its own steps, and wait for a file ``released`` there.

    It makes four more at most, and then waits for ever, where its folder holds a file ``until killed``.
    """
    log, made = MetricsLog.__call__, []

    def log_and_wait(self: MetricsLog, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        folder = self._path.parent
        # An evaluation is no step.
        if "train/loss" not in metrics:
            return
        made.append(step)
        if len(made) == steps:
            told.write_text(f"{folder}\n")
            wait_until((folder / "released").exists)
        while len(made) == steps + 4 and (folder / "until killed").exists():
            signal.pause()

    MetricsLog.__call__ = log_and_wait


def make_peak_product_small() -> None:
    matrix_products.PEAK_SIDE = {"cpu": 64}


def fill_disk(largest: int) -> None:
    """Let there be space for no larger files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    # The process of a cell would have the same limit.
    keep_cells()


def prepare_run(prepare: Callable[[], None] | None) -> None:
    """Look at no picture: that of ``undisturbed``, which is no copy, is drawn."""
    Figure.savefig = save_blank
    if prepare is not None:
        prepare()


class Run(Copies):
    """train.py in a process of its own, and the end of it; nothing may ever show a traceback."""

    def __init__(self, place: Path, arguments: list[str], prepare: Any = None) -> None:
        output = place / "output" / str(time.monotonic_ns())
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")}
        prepared = partial(prepare_run, prepare)
        super().__init__(output, [offline], be_command, "train.py", arguments, place, prepared)
        (self.process,) = self.processes

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        (status,), (out,), (err,) = self.wait(), self.out(), self.err()
        assert "Traceback" not in out + err, err
        return status, out, err


def held(place: Path, arguments: list[str], steps: int) -> tuple[Run, Path]:
    """A run that waits after so many steps of its own, and its folder."""
    told = place / "held"
    told.unlink(missing_ok=True)
    run = Run(place, arguments, partial(hold, steps, told))
    try:
        wait_until(lambda: told.exists() and told.read_text().endswith("\n"), run.alive)
    except AssertionError as error:
        run.process.kill()
        raise AssertionError(run.wait(), run.err()) from error
    return run, Path(told.read_text().strip())


def release(run: Path) -> None:
    (run / "released").touch()


def run_cli(place: Path, *arguments: str) -> tuple[int, str, str]:
    return Run(place, list(arguments)).finish()


def run_python(place: Path, *command: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of Python itself."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=place,
        env=environment_apart(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def sweep_cli(place: Path, *arguments: str) -> tuple[int, str, str]:
    """As ``run_cli``, a multirun whose cells are in that one process."""
    return Run(place, ["-m", *arguments], keep_cells).finish()


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and moments at the end of a run."""
    return stored(run / read_json(run / "result.json")["checkpoint"])


def assert_same_end(run: Path, other: Path) -> None:
    assert same(weights(run), weights(other))
    assert logged(run) == logged(other)
    assert read_json(run / "result.json")["valid"] == read_json(other / "result.json")["valid"]


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    status, out, err = run_python(place, str(ROOT / "train.py"), *options(place, "whole"))
    assert status == 0, err
    assert "torch.distributed" not in err
    (run,) = run_folders(place / "whole")
    assert f"everything is in {run}" in out
    for split in ("training", "validation", "test"):
        assert out.count(f"{split} split: documents 1, bytes ") == 1
    return run


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of a finished run that has not yet said so."""
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.slow
def test_a_run_leaves_everything_in_its_folder(place, undisturbed):
    assert undisturbed.parent == place / "whole" / "train" / "stage1-tiny"
    for name in ("run.json", "result.json"):
        told = read_json(undisturbed / name)
        assert told["seed"] == 0
        assert told["versions"]["torch"]
        assert len(told["identity"]) == 16
        assert "commit" in told
        assert told["config"]["train"]["steps"] == STEPS
        assert told["config"]["model"]["complex"]["d_model"] == 16
    composed = yaml.safe_load((undisturbed / ".hydra" / "config.yaml").read_text())
    assert composed["train"]["steps"] == STEPS
    assert "stage=1" in (undisturbed / ".hydra" / "overrides.yaml").read_text().replace("'", "")
    result = read_json(undisturbed / "result.json")
    assert result["steps"] == STEPS
    assert result["valid"]["loss"] < logged(undisturbed)[0]["train/loss"]
    assert result["tokens"] == STEPS * 2 * 16
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (undisturbed / "sample.txt").read_text(encoding="utf-8")
    assert not (undisturbed / "wandb").exists()
    steps = [line["step"] for line in logged(undisturbed) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert [line["step"] for line in logged(undisturbed) if "valid/loss" in line] == EVALUATIONS
    assert [line["step"] for line in logged(undisturbed) if "valid/whole_loss" in line] == [STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("root", "kills", "extra"),
    [("killed", 2, []), ("killed in the background", 1, ["train.async_checkpoint=true"])],
    ids=["at once", "in the background"],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(place, undisturbed, root, kills, extra):
    generator = random.Random(7)
    arguments = [*options(place, root), *extra, "resume=auto"]
    for _ in range(kills):
        killed, run = held(place, arguments, generator.randint(4, 7))
        (run / "until killed").touch()
        release(run)
        time.sleep(generator.uniform(0, 0.05))
        killed.process.kill()
        assert killed.wait() == [-signal.SIGKILL]
    status, out, err = run_cli(place, *arguments)
    assert status == 0, err
    assert "torch.distributed" not in err
    folders = run_folders(place / root)
    assert len(folders) == kills + 1
    assert "resuming" in out
    assert_same_end(folders[-1], undisturbed)


@pytest.mark.slow
def test_a_signal_ends_a_run_that_can_be_continued(place, undisturbed):
    resume = "auto"
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped, run = held(place, [*options(place, "stopped"), f"resume={resume}"], 5)
        os.kill(stopped.process.pid, number)
        release(run)
        status, out, err = stopped.finish()
        assert status == 128 + number
        assert "stopping after this step" in err
        steps = [line["step"] for line in logged(run) if "train/loss" in line]
        assert f"step {steps[-1]} is saved, resume=auto" in out
        assert find_checkpoint(run).name == f"step_{steps[-1]:08d}"
        assert steps == list(range(1, steps[-1] + 1))
        assert not (run / "result.json").exists()
    # The last part names the folder instead, and may log elsewhere.
    status, out, err = run_cli(place, *options(place, "stopped elsewhere"), f"resume={run}")
    assert status == 0, err
    (last,) = run_folders(place / "stopped elsewhere")
    assert (last / read_json(last / "run.json")["resumed_from"]).samefile(run)
    assert f"resuming {run} after step {steps[-1]}" in out
    assert_same_end(last, undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_can_be_continued(place, undisturbed):
    previous = unfinished(undisturbed, place / "full before")
    shutil.rmtree(previous / "checkpoints" / f"step_{STEPS:08d}")
    good = find_sound_checkpoint(previous)
    full = Run(place, [*options(place, "full"), f"resume={previous}"], partial(fill_disk, 65536))
    status, _, err = full.finish()
    assert status == 1
    (message,) = errors(err)
    assert f"the checkpoint of step {STEPS} could not be written" in message
    assert "File too large" in message
    (run,) = run_folders(place / "full")
    assert not (run / "result.json").exists()
    left = find_sound_checkpoint(run)
    assert left.name == good.name < f"step_{STEPS:08d}"
    assert not list((run / "checkpoints").glob(".step*"))
    status, out, err = run_cli(place, *options(place, "full"), f"resume={run}")
    assert status == 0, err
    assert f"resuming {run} after step {int(good.name[5:])}" in out
    last = run_folders(place / "full")[-1]
    assert_same_end(last, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["a run", "a sweep"])
def test_a_disk_that_is_full_for_another_file_is_one_sentence(place, multirun):
    root = f"no space {len(multirun)}"
    arguments = [*options(place, root), "train.eval_every=0", "train.checkpoint_every=0", *multirun]
    status, _, err = Run(place, arguments, partial(fill_disk, 8192)).finish()
    assert status == 1
    (message,) = errors(err)
    assert re.search(r"no space is left for .*metrics\.jsonl \(File too large\); free some", message)
    if multirun:
        (summary,) = find_files(place / root, "summary.json")
        (cell,) = read_json(summary)
        assert cell["status"] == "failed"
        assert f"error: {cell['error']}" == message


def flip_a_bit(checkpoint: Path) -> None:
    """Damage a checkpoint, and every one that is linked to it."""
    with open(checkpoint / "__0_0.distcp", "r+b") as file:
        file.seek(10_000)
        byte = file.read(1)
        file.seek(10_000)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.slow
def test_a_continued_run_whose_checkpoint_is_damaged_before_it_saved_goes_on(place, undisturbed):
    arguments = [*options(place, "damaged early"), "resume=auto"]
    for steps in (7, 1):
        killed, run = held(place, arguments, steps)
        killed.process.kill()
        killed.wait()
    flip_a_bit(find_checkpoint(run))
    status, out, err = run_cli(place, *arguments)
    assert status == 0, err
    assert f"the checkpoint {find_checkpoint(run)} is damaged" in err
    assert f"resuming {run} after step 3" in out
    last = run_folders(place / "damaged early")[-1]
    assert_same_end(last, undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(place, undisturbed):
    one, every = (unfinished(undisturbed, place / "damaged before" / name) for name in ("one", "every"))
    before, *_, newest = sorted(path.name for path in (one / "checkpoints").glob("step_*"))[-2:]
    spoiled = [one / "checkpoints" / newest, *(every / "checkpoints").glob("step_*")]
    for checkpoint in spoiled:
        flip_a_bit(checkpoint)
    status, out, err = sweep_cli(place, *options(place, "damaged"), f"resume={one},{every}")
    assert status == 1
    (message,) = errors(err)
    assert f"every checkpoint of {every} is damaged" in message
    for checkpoint in spoiled:
        assert f"the checkpoint {checkpoint} is damaged" in err
    assert f"resuming {one} after step {int(before[5:])}" in out
    (last,) = run_folders(place / "damaged")
    assert_same_end(last, undisturbed)


@pytest.mark.slow
def test_a_run_is_exported_into_one_file(place, undisturbed):
    file = place / "exported.safetensors"
    status, out, err = run_python(place, "-m", "muse.export", str(undisturbed), str(file))
    assert status == 0, err
    best = find_checkpoint(undisturbed, "best")
    assert out == f"the weights after step {int(best.name[5:])} are in {file}\n"
    model, tokenizer, config = muse.load(file)
    assert tokenizer is not None
    assert tokenizer.to_json() == (undisturbed / "tokenizer.json").read_text(encoding="utf-8")
    assert dataclasses.asdict(config) == read_json(undisturbed / "run.json")["config"]
    exported = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert same(exported, stored(best, "model"))


@pytest.mark.slow
def test_a_profiled_run_is_the_same_run(place):
    arguments = [*options(place, "profiled"), "train.steps=13"]
    status, _, err = run_cli(place, *arguments)
    assert status == 0, err
    status, out, err = Run(place, [*arguments, "profile=true"], make_peak_product_small).finish()
    assert status == 0, err
    plain, profiled = run_folders(place / "profiled")
    assert same(weights(profiled), weights(plain))
    assert logged(profiled) == logged(plain)
    assert read_json(profiled / "run.json")["identity"] == read_json(plain / "run.json")["identity"]
    told = read_json(profiled / "profile.json")
    assert told["files"] == ["memory.json", "trace.json.gz"]
    assert all((profiled / name).stat().st_size for name in told["files"])
    assert told["operations"][0]["name"] in out
    assert "of the peak measured here" in out


@pytest.mark.slow
def test_a_run_too_short_to_be_profiled_is_refused_before_it_starts(place):
    status, _, err = run_cli(place, *options(place, "too short"), "train.steps=5", "profile=true")
    assert status == 1
    (message,) = errors(err)
    assert "train.steps=5 is too few; profile=true needs 12 steps" in message
    assert run_folders(place / "too short") == []


@pytest.mark.slow
def test_a_finished_run_is_left_alone(place, undisturbed):
    status, out, err = run_cli(place, *options(place, "again"), f"resume={undisturbed}")
    assert status == 0, err
    assert f"{undisturbed} is finished" in out
    assert run_folders(place / "again") == []


@pytest.mark.slow
def test_a_finished_run_is_extended_by_its_folder_and_what_changes(place, undisturbed):
    """All else comes from the run, though the command has other defaults."""
    elsewhere = [f"output_root={place / 'extended'}", f"data.cache={place / 'cache'}", "hardware=cpu"]
    arguments = [*elsewhere, "logger=none", f"resume={undisturbed}"]
    status, out, err = run_cli(place, *arguments, f"train.steps={STEPS + 3}", "stage=1")
    assert status == 0, err
    assert f"resuming {undisturbed} after step {STEPS}, train.steps: {STEPS} → {STEPS + 3}" in out
    assert "the learning rate of" in err
    (run,) = run_folders(place / "extended")
    assert run.parent.name == "stage1-tiny"
    told, before = (read_json(folder / "run.json")["config"] for folder in (run, undisturbed))
    assert told["train"] == {**before["train"], "steps": STEPS + 3}
    assert told["model"] == before["model"]
    assert len(logged(run)) > len(logged(undisturbed))
    assert read_json(run / "result.json")["steps"] == STEPS + 3
    status, _, err = run_cli(place, *arguments, "stage=2", "train.batch_size=4")
    assert status == 1
    (message,) = errors(err)
    assert "(stage: 1 → 2, train.batch_size: 2 → 4)" in message
    assert len(run_folders(place / "extended")) == 1


@pytest.mark.slow
def test_other_texts_are_evaluated_at_the_end_and_again_where_they_change(place):
    (place / "other.txt").write_text("Line 7 says\n    that 49 is the square of 7.\n" * 9, encoding="utf-8")
    arguments = [*options(place, "sets"), "train.steps=3"]
    status, out, err = run_cli(place, *arguments, "train.eval_sets.other=other.txt")
    assert status == 0, err
    (run,) = run_folders(place / "sets")
    told = read_json(run / "result.json")["sets"]
    assert list(told) == ["other"]
    lines = [line for line in logged(run) if "sets/other_loss" in line]
    assert [(line["step"], line["sets/other_loss"]) for line in lines] == [(3, told["other"]["loss"])]
    assert "other" in out
    sets = "train.eval_sets={other:other.txt,same:other.txt}"
    status, out, err = run_cli(place, *arguments, sets, f"resume={run}")
    assert status == 0, err
    (again,) = {*run_folders(place / "sets")} - {run}
    assert read_json(again / "result.json")["sets"] == {"other": told["other"], "same": told["other"]}
    assert len([line for line in logged(again) if "sets/other_loss" in line]) == 1
    status, _, err = run_cli(place, *arguments, "train.eval_sets.none=none.txt")
    assert status == 1
    (message,) = errors(err)
    assert "train.eval_sets.none none.txt is not readable (No such file or directory)" in message


@pytest.mark.slow
def test_a_sweep_over_bare_stage_numbers_goes_on_after_a_job_that_diverges(place):
    arguments = [argument for argument in options(place, "sweep") if not argument.startswith("stage=")]
    status, _, err = sweep_cli(
        place,
        *arguments,
        "stage=0,1",
        "optim.lr=1e30,0.01",
        "optim.warmup=0",
        "train.steps=4",
        "train.checkpoint_every=1",
        "logger=wandb",
    )
    assert status == 1
    runs = run_folders(place / "sweep")
    assert len(runs) == 4
    outcome = [
        (read_json(run / "run.json")["config"]["stage"]["number"], (run / "result.json").exists())
        for run in runs
    ]
    assert outcome == [("0", False), ("0", True), ("1", False), ("1", True)]
    assert len({run.parent for run in runs}) == 1
    for run, (number, finished) in zip(runs, outcome, strict=True):
        assert f"stage{number}" in run.name
        assert yaml.safe_load((run / ".hydra" / "config.yaml").read_text())["stage"]["number"] == number
        assert list(run.glob("wandb/offline-run-*/*.wandb"))
        if not finished:
            (message,) = [line for line in errors(err) if str(run) in line]
            assert "is not finite in step 2" in message
            assert str(run / "checkpoints" / "step_00000001") in message
            assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert len(errors(err)) == 2


@pytest.mark.slow
def test_options_that_cannot_be_used_are_one_sentence_each(place, undisturbed):
    (place / "empty").mkdir()
    arguments = [argument for argument in options(place, "refused") if not argument.startswith("hardware")]
    resume = f"resume=never,{undisturbed},{place / 'empty'},{place / 'nowhere'}"
    fitting = [*arguments, "train.steps=2", "hardware=cpu"]
    status, _, err = sweep_cli(place, *fitting, "optim.schedule=foo,wsd", resume)
    assert status == 1
    found = errors(err)
    assert len(found) == 7
    assert sum(line.startswith("error: optim.schedule=foo") for line in found) == 4
    assert all("cosine, wsd, constant" in line for line in found if "optim.schedule" in line)
    resumed = [line for line in found if "train.steps=2" in line or line.startswith("error: resume=")]
    assert len(resumed) == 3
    assert f"train.steps=2 is less than the {STEPS} steps that {undisturbed} has made" in resumed[0]
    assert "holds no checkpoint" in resumed[1]
    assert "holds no checkpoint" in resumed[2]
    # The one job without a fault ran.
    assert len(list((place / "refused").glob("train/**/result.json"))) == 1
    status, _, err = run_cli(place, *arguments, "hardware=cuda")
    assert status == 1
    (message,) = errors(err)
    assert "hardware.device=cuda" in message
    assert "hardware=cpu" in message


@pytest.mark.slow
def test_data_that_is_not_there_is_one_sentence_each(place):
    arguments = [argument for argument in options(place, "no data") if not argument.startswith("data")]
    status, _, err = sweep_cli(place, *arguments, "data=wikitext2,text,synthetic", "data.cache=cache")
    assert status == 1
    wikitext, text, synthetic = errors(err)
    assert "data=wikitext2" in wikitext
    assert "data.path=" in wikitext
    assert "data=text needs data.path=" in text
    assert "data=synthetic" in synthetic
    assert "stdlib" in synthetic


@pytest.mark.slow
def test_an_option_that_does_not_exist_is_one_sentence(place):
    status, _, err = run_cli(place, f"output_root={place / 'wrong'}", "train.stepz=3")
    assert status == 1
    assert re.fullmatch(r"error: train\.stepz=3 is not known; the nearest are train\.steps, [^\n]*\n", err)
    assert not (place / "wrong").exists()


@pytest.mark.slow
def test_cfg_job_shows_the_composed_configuration(place):
    status, out, _err = run_cli(place, "stage=0", "train.steps=7", "--cfg", "job")
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["stage"]["number"] == "0"
    assert shown["train"]["steps"] == 7
    assert not (place / "outputs").exists()
