"""Runs that go on, in this process; tests/launch/test_train_cli.py has them as a user starts them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import small_sizes, write_text
from support.runs import logged, same, stored

from muse.config import (
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)
from muse.errors import ConfigError
from muse.report.metrics import FILE, read_metrics
from muse.runs.checkpoints import find_checkpoint, load_state
from muse.runs.folder import RESULT_FILE, RUN_FILE
from muse.runs.provenance import provenance
from muse.training.evaluate import Evaluation
from muse.training.resume import lines_before, run_to_resume
from muse.training.run import _summary, _table, run_training
from muse.training.trainer import TrainResult


def write(run, text):
    run.mkdir()
    (run / FILE).write_text(text)


@pytest.mark.parametrize(("step", "kept"), [(1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3, 3])])
def test_a_continued_run_logs_no_line_twice_and_misses_none(tmp_path, step, kept):
    """Evaluations of windows come before the checkpoint of their step, that of the whole split after it."""
    keys = (
        "train/loss",
        "train/loss",
        "valid/loss",
        "train/loss",
        "valid/loss",
        "valid/whole_loss",
        "test/loss",
    )
    lines = zip((1, 2, 2, 3, 3, 3, 3), keys, strict=True)
    write(tmp_path / "old", "".join(f'{{"step": {n}, "{key}": 1.0}}\n' for n, key in lines))
    assert [line["step"] for line in lines_before(tmp_path / "old", step, last_step=3)] == kept
    # A run that goes on further does not evaluate the whole split there again.
    assert len(lines_before(tmp_path / "old", 3, last_step=4)) == 7


def test_an_extended_run_keeps_the_evaluation_of_its_former_end(tmp_path):
    write(tmp_path / "old", '{"step": 3, "train/loss": 1.0}\n{"step": 3, "valid/loss": 1.0}\n')
    assert len(lines_before(tmp_path / "old", 3, last_step=4)) == 2


def described(run: Path, config: RunConfig, **more: Any) -> Path:
    """The folder of a run with these options and an empty checkpoint."""
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    told = provenance(config)
    # As before there were such notes.
    (run / RUN_FILE).write_text(json.dumps({**told, **more}))
    return run


def with_train(config: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def found(config: RunConfig, in_sweep: bool = False) -> Path | None:
    previous = run_to_resume(config, in_sweep)
    return None if previous is None else previous.run


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(data=DataConfig(name="stdlib"), output_root=str(tmp_path), resume="auto")


def test_a_run_is_continued_if_it_has_a_checkpoint_whatever_became_of_other_files(tmp_path, config):
    names = ("first", "second", "without a checkpoint")
    runs = [described(tmp_path / "train" / "tiny" / name, config) for name in names]
    for run in runs:
        (run / "checkpoints" / "best").write_text("step_00000009")
    (runs[2] / "checkpoints" / "step_00000004").rmdir()
    assert found(config) == runs[1]
    config.resume = str(runs[0])
    assert found(config) == runs[0]
    # Without its description it may lack metrics of the run that it continued, too.
    (runs[0] / RUN_FILE).unlink()
    for run in (runs[0], runs[2]):
        config.resume = str(run)
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            run_to_resume(config)


def test_a_table_has_a_dash_and_a_reason_for_a_perplexity_that_does_not_exist(tmp_path):
    words = Evaluation(2.0, 7.4, 99.5, 1.5, 1000, None)
    none = Evaluation(2.0, 7.4, None, 1.5, 1000, "words of 41 bytes on average are none")
    result = TrainResult(1, words, none, 1, 1, 1.0, 1.0, None, None)
    _, _, valid, test, *reasons = _table(result, {}).splitlines()
    assert valid.split()[3] == "99.5"
    assert test.split()[3] == "-"
    assert reasons == ["test has no perplexity per word: words of 41 bytes on average are none"]
    assert _summary(result, tmp_path)["test"]["word_ppl_reason"] == "words of 41 bytes on average are none"


def test_a_cell_of_a_sweep_is_not_that_of_other_hardware(tmp_path, config):
    runs = {}
    for threads in (1, 2):
        there = dataclasses.replace(config, hardware=HardwareConfig(threads=threads))
        runs[threads] = described(tmp_path / "train" / f"threads {threads}", there)
    for threads, own in ((1, runs[1]), (2, runs[2]), (None, None)):
        config.hardware = HardwareConfig(threads=threads)
        assert found(config, in_sweep=True) == own
        # A training alone goes on wherever it is.
        assert found(config) == runs[2]
    config.resume = str(runs[1])
    assert found(config, in_sweep=True) == runs[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", 900), ("train.eval_every", 7), ("train.eval_tokens", 9), ("train.eval_stride", 8),
        ("train.test", True), ("train.checkpoint_every", 3), ("train.sample_tokens", 1), ("optim.lr", 1.0),
        ("optim.muon_lr", 1.0), ("optim.schedule", "wsd"), ("optim.warmup", 1), ("optim.decay", 0.5),
        ("optim.final_lr", 1.0),
    ],
)  # fmt: skip
def test_what_says_how_a_run_goes_on_may_change_by_its_folder_alone(tmp_path, config, name, value):
    """A sweep over it must not mix its cells, nor must resume=auto take another run than the one meant."""
    run = described(tmp_path / "train" / "run", config)
    group, _, option = name.partition(".")
    part = dataclasses.replace(getattr(config, group), **{option: value})
    other = dataclasses.replace(config, **{group: part})
    assert found(other) is found(other, in_sweep=True) is None
    other.resume = str(run)
    old = getattr(getattr(config, group), option)
    assert run_to_resume(other).changes == {name: (old, value)}


def test_what_was_trained_with_other_options_names_each(tmp_path, config):
    run = described(tmp_path / "train" / "run", config)
    other = with_train(dataclasses.replace(config, seed=3, resume=str(run)), steps=900, batch_size=4)
    with pytest.raises(ConfigError) as error:
        run_to_resume(other)
    assert "(seed: 0 → 3, train.batch_size: 16 → 4)" in str(error.value)


def test_auto_says_what_it_found_what_it_took_and_what_kept_it_from_the_nearest(tmp_path, config, capsys):
    root = tmp_path / "train"
    assert found(config) is None
    assert capsys.readouterr().out == f"resume=auto found no run below {root}; a new one begins\n"
    described(root / "far", with_train(dataclasses.replace(config, seed=4), batch_size=4))
    near = described(root / "near", config)
    assert found(with_train(config, steps=900)) is None
    told = (
        f"resume=auto found no run of these options, so a new one begins; the nearest, {near}, has others: "
        "train.steps: 800 → 900"
    )
    assert capsys.readouterr().out == f"{told}; resume={near} would go on with it after step 4\n"
    # Which would be wrong in a sweep over the steps, and impossible with other data.
    assert found(with_train(config, steps=900), in_sweep=True) is None
    assert capsys.readouterr().out == f"{told}\n"
    assert found(dataclasses.replace(config, seed=1)) is None
    assert capsys.readouterr().out.endswith(f"{near}, has others: seed: 0 → 1\n")
    assert found(config) == near
    assert (
        capsys.readouterr().out == f"resume=auto found a run of these options and takes the newest, {near}\n"
    )


def test_a_cell_of_a_sweep_is_no_run_whose_options_changed_on_its_way(tmp_path, config, capsys):
    changes = [{"after_step": 2, "options": {"train.steps": [2, 800]}}]
    run = described(tmp_path / "train" / "run", config, changes=changes)
    assert found(config, in_sweep=True) is None
    assert found(config) == run
    assert "after changes of its options" in capsys.readouterr().out
    elsewhere = [{"after_step": 2, "options": {"train.async_checkpoint": [False, True]}}]
    run = described(tmp_path / "train" / "other", config, changes=elsewhere)
    assert found(config, in_sweep=True) == run


@pytest.fixture
def small(tmp_path) -> RunConfig:
    """Eight steps of a model with some thousand parameters, at one rate after two steps."""
    write_text(tmp_path)
    return RunConfig(
        stage=StageConfig(dropout=0.2),
        model=small_sizes(300, 16, layers=1),
        data=DataConfig(name="text", path=str(tmp_path / "text.txt"), cache=str(tmp_path / "cache")),
        tokenizer=TokenizerConfig(vocab_size=300),
        optim=OptimConfig(schedule="constant", warmup=2),
        hardware=HardwareConfig(device="cpu", threads=1),
        logger=LoggerConfig(mode="disabled", log_every=1),
        train=TrainConfig(
            steps=8, batch_size=2, eval_every=4, eval_tokens=0, checkpoint_every=3, sample_tokens=0
        ),
        output_root=str(tmp_path),
    )


@pytest.fixture
def trained(tmp_path):
    """Trains into a folder of this name, and returns it."""

    def train(name: str, config: RunConfig) -> Path:
        run = tmp_path / "train" / name
        assert run_training(config, run) == 0
        return run

    return train


def read(run: Path, name: str = RESULT_FILE) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def end_of(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and moments at the end of a run."""
    return stored(run / read(run)["checkpoint"])


@pytest.mark.parametrize(("optim", "precision"), [("adamw", "bf16"), ("muon", "fp32")])
def test_a_finished_run_that_is_extended_twice_ends_with_the_bits_of_an_undisturbed_one(
    small, trained, optim, precision
):
    small.optim.name, small.stage.precision = optim, precision
    whole = trained("whole", with_train(small, steps=16))
    run = trained("8", small)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the learning rate|validation losses")
        for steps in (12, 16):
            more = with_train(dataclasses.replace(small, resume=str(run)), steps=steps)
            run = trained(str(steps), more)
    assert same(end_of(run), end_of(whole))
    # The former ends were of the whole split.
    assert [
        line for line in logged(run) if line["step"] in (16, *range(8)) or "valid/whole_loss" not in line
    ] == logged(whole)
    assert read(run)["valid"] == read(whole)["valid"]
    assert find_checkpoint(run, "best").name == find_checkpoint(whole, "best").name
    assert load_state(find_checkpoint(run)).best_loss == load_state(find_checkpoint(whole)).best_loss
    changes = [{"after_step": n, "options": {"train.steps": [n, n + 4]}} for n in (8, 12)]
    assert read(run)["changes"] == read(run, RUN_FILE)["changes"] == changes
    assert "changes" not in read(whole, RUN_FILE)


def test_the_best_checkpoint_of_a_former_end_stays_until_there_is_a_better_one(small, trained):
    """At a rate that wrecks the model nothing that comes after the former end is better."""
    first = trained("first", small)
    assert find_checkpoint(first, "best").name == "step_00000008"
    wrecked = dataclasses.replace(small, resume=str(first), optim=OptimConfig(lr=9.0, schedule="constant"))
    with pytest.warns(UserWarning, match="learning rate"):
        second = trained("second", with_train(wrecked, steps=13))
    assert read(second)["valid"]["loss"] > read(first)["valid"]["loss"]
    assert find_checkpoint(second, "best").name == "step_00000008"
    third = trained("third", with_train(dataclasses.replace(wrecked, resume=str(second)), steps=14))
    assert find_checkpoint(third, "best").name == "step_00000008"
    # Of other tokens, the best is looked for anew.
    elsewhere = with_train(dataclasses.replace(wrecked, resume=str(third)), steps=15, eval_tokens=32)
    with pytest.warns(UserWarning, match=r"up to step 14 were measured with other train\.eval_tokens"):
        fourth = trained("fourth", elsewhere)
    assert find_checkpoint(fourth, "best").name == "step_00000015"


@pytest.mark.parametrize(("schedule", "had_ended"), [("cosine", True), ("wsd", True), ("constant", False)])
def test_a_schedule_that_had_ended_warns_of_both_rates(small, trained, recwarn, schedule, had_ended):
    small.optim = OptimConfig(schedule=schedule, warmup=0, lr=0.01, final_lr=0.0)
    run = trained("first", small)
    trained("second", with_train(dataclasses.replace(small, resume=str(run)), steps=9))
    told = [str(warning.message) for warning in recwarn if "learning rate" in str(warning.message)]
    assert len(told) == had_ended
    if had_ended:
        assert f"was 0 in step 8, where optim.schedule={schedule} ended, and is 0 in step 9" in told[0]


def test_a_run_cannot_be_shorter_than_it_is(small, trained):
    run = trained("first", small)
    short = with_train(dataclasses.replace(small, resume=str(run)), steps=7)
    with pytest.raises(ConfigError, match=f"train.steps=7 is less than the 8 steps that {run} has made"):
        trained("second", short)


def test_a_finished_run_gets_the_evaluation_that_it_lacks(small, trained):
    run = trained("first", small)
    tested = trained("second", with_train(dataclasses.replace(small, resume=str(run)), test=True))
    assert same(end_of(tested), end_of(run))
    assert read(run)["test"] is None
    assert math.isfinite(read(tested)["test"]["loss"])
    lines = [line for line in logged(tested) if line["step"] == 8]
    assert [next(key for key in line if key != "step") for line in lines] == [
        "train/loss", "valid/loss", "valid/whole_loss", "test/loss",
    ]  # fmt: skip


def test_a_run_that_was_moved_is_whole(small, trained, tmp_path):
    first = trained("first", small)
    weights = end_of(first)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(first, moved)
    assert same(end_of(moved), weights)
    again = trained("reused", dataclasses.replace(small, resume=str(moved)))
    assert (again / read(again)["reused_from"]).resolve() == moved.resolve()
    assert same(end_of(again), weights)
    second = trained("second", with_train(dataclasses.replace(small, resume=str(moved)), steps=9))
    assert read(second, RUN_FILE)["resumed_from"] == "../../elsewhere/moved"
    texts = [(run / name).read_text() for run in (moved, second) for name in (RUN_FILE, RESULT_FILE)]
    named = [json.loads(text) for text in texts]
    for told in named:
        # As the user wrote them.
        told.pop("config")
        assert str(tmp_path) not in json.dumps(told)


def test_a_run_from_before_changes_were_noted_goes_on(small, trained):
    """Its paths are absolute, its best checkpoint has no loss beside it, and it notes no ranks."""
    run = trained("first", small)
    told = read(run, RUN_FILE)
    del told["ranks"], told["config"]["stage"]["confinement"]
    (run / RUN_FILE).write_text(json.dumps({**told, "identity": "of another version", "resumed_from": None}))
    (run / "checkpoints" / "best").write_text("step_00000008")
    result = read(run)
    (run / RESULT_FILE).write_text(json.dumps({**result, "checkpoint": str(run / result["checkpoint"])}))
    reused = trained("reused", dataclasses.replace(small, resume="auto"))
    assert same(end_of(reused), end_of(run))
    more = trained("more", with_train(dataclasses.replace(small, resume=str(run)), steps=9))
    assert read(more)["steps"] == 9


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = dataclasses.replace(small, logger=LoggerConfig(tensorboard=True))
    with pytest.raises(ConfigError, match="logger=tensorboard needs the package tensorboard"):
        run_training(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_run_from_before_there_were_other_trackers_than_wandb_goes_on_with_whole_curves(small, trained):
    first = trained("first", small)
    description = read(first, RUN_FILE)
    for option in ("tensorboard", "csv"):
        assert not description["config"]["logger"].pop(option)
    (first / RUN_FILE).write_text(json.dumps(description))
    others = LoggerConfig(tensorboard=True, csv=True, log_every=1)
    second = trained(
        "second", with_train(dataclasses.replace(small, resume=str(first), logger=others), steps=9)
    )
    with open(second / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    assert rows == read_metrics(second)
    assert {row["step"] for row in rows} == set(range(1, 10))
    assert list((second / "tensorboard").glob("events.*"))
