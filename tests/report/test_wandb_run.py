"""The W&B run of a folder, read back from what W&B wrote offline; online W&B is a stand-in."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import wandb
from support.commands import commands_here
from support.configs import write_text
from support.processes import Copies, be_command
from support.waiting import wait_until

from muse.config import DataConfig, LoggerConfig, ModelConfig, RunConfig
from muse.report.metrics import MetricsLog, read_metrics
from muse.report.wandb_run import FILE


def config(mode: str = "offline", **logger: object) -> RunConfig:
    return RunConfig(
        logger=LoggerConfig(mode=mode, **logger),
        model=ModelConfig(name="small"),
        data=DataConfig(name="stdlib"),
    )


def finished(
    run: Path, settings: RunConfig, steps: tuple[int, ...] = (1, 2), **continued: object
) -> str | None:
    """Log the steps, end the run and return its W&B id."""
    log = MetricsLog(run, settings, **continued)
    for step in steps:
        log(step, {"train/loss": 1 / step})
    log.close()
    return log.wandb_id


def synced_folder(out: str) -> Path:
    """The folder of the one line ``wandb sync <folder>``, as a shell would read it."""
    (line,) = [line for line in out.splitlines() if line.startswith("wandb sync")]
    words = shlex.split(line)
    assert words[:2] == ["wandb", "sync"]
    assert len(words) == 3
    return Path(words[2])


def test_an_offline_run_has_group_and_tags_and_prints_how_it_is_uploaded(tmp_path, read_wandb, capsys):
    run = tmp_path / "it's a $run"
    identifier = finished(run, config(tags=["mine", "small"], entity="me", project="p"))
    uploaded = read_wandb(run)
    assert (uploaded.run.run_group, uploaded.run.entity, uploaded.run.project) == ("stage1-small", "me", "p")
    assert list(uploaded.run.tags) == ["stage1", "small", "stdlib", "mine"]
    assert uploaded.exit_code == 0
    folder = synced_folder(capsys.readouterr().out)
    assert list(folder.glob(f"*{identifier}.wandb"))
    noted = json.loads((run / FILE).read_text())
    assert (noted["id"], noted["group"]) == (identifier, "stage1-small")
    # Relative, so that a run that is moved is whole.
    assert not Path(noted["folder"]).is_absolute()
    assert (run / noted["folder"]).samefile(folder)


def test_a_failed_run_is_uploaded_as_one_that_failed(tmp_path, read_wandb, capsys):
    log = MetricsLog(tmp_path, config())
    log.close(failed=True)
    assert read_wandb(tmp_path).exit_code == 1
    assert synced_folder(capsys.readouterr().out).is_dir()


def test_steps_that_are_logged_twice_are_all_kept_over_the_training_step(tmp_path, read_wandb):
    steps = (1, 2, 3, 2, 3, 4)
    finished(tmp_path, config(), steps)
    uploaded = read_wandb(tmp_path)
    assert [line["train/step"] for line in uploaded.history] == list(steps)
    assert [line["train/loss"] for line in uploaded.history] == [1 / step for step in steps]
    (metric,) = uploaded.metrics
    assert (metric.glob_name, metric.step_metric) == ("*", "train/step")


@pytest.mark.parametrize("group", [None, "other"])
def test_an_offline_run_that_goes_on_is_a_new_one_linked_to_the_old(tmp_path, read_wandb, capsys, group):
    old, new = tmp_path / "old", tmp_path / "new"
    first = finished(old, config(group="sweep-1"))
    capsys.readouterr()
    second = finished(new, config(group=group), (3,), wandb_id=first, previous=old)
    uploaded = read_wandb(new)
    assert uploaded.run.run_id == second != first
    assert not uploaded.run.resume
    assert uploaded.run.run_group == (group or "sweep-1")
    assert uploaded.config["continues"] == {"wandb_id": first, "folder": str(old)}
    assert first in uploaded.run.notes
    assert str(old) in uploaded.run.notes
    out = capsys.readouterr().out
    assert first in out
    assert second in out
    assert "offline" in out


def test_a_run_that_goes_on_from_one_without_wandb_still_names_its_folder(tmp_path, read_wandb):
    finished(tmp_path / "old", config("disabled"))
    finished(tmp_path / "new", config(), previous=tmp_path / "old")
    assert read_wandb(tmp_path / "new").config["continues"] == {
        "wandb_id": None,
        "folder": str(tmp_path / "old"),
    }


class Online:
    """A server that knows some runs, in place of wandb.init and the run it returns."""

    def __init__(self, known: tuple[str, ...], tags: tuple[str, ...] = ()) -> None:
        self.known, self.tags, self.calls = known, tags, []
        self.offline, self.summary, self.logged = False, {}, []
        self.settings = wandb.Settings()

    def init(self, **options: object) -> Online:
        self.calls.append(options)
        if options.get("resume") == "must" and options["id"] not in self.known:
            raise wandb.errors.UsageError("the run does not exist")
        self.id = options.get("id") or "fresh"
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, values: dict[str, object]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None: ...


def test_online_the_same_run_goes_on_and_keeps_its_tags(tmp_path, monkeypatch, capsys):
    server = Online(("abc",), tags=("from the browser", "small"))
    monkeypatch.setattr(wandb, "init", server.init)
    assert finished(tmp_path, config("online"), wandb_id="abc", previous=tmp_path / "old") == "abc"
    (call,) = server.calls
    assert (call["id"], call["resume"]) == ("abc", "must")
    assert "tags" not in call
    assert server.tags == ("from the browser", "small", "stage1", "stdlib")
    assert capsys.readouterr().out == ""


def test_a_run_that_the_server_does_not_know_goes_on_as_a_linked_new_one(tmp_path, monkeypatch, capsys):
    server = Online(("another",))
    monkeypatch.setattr(wandb, "init", server.init)
    old = tmp_path / "old"
    assert finished(tmp_path / "new", config("online"), wandb_id="abc", previous=old) == "fresh"
    _, call = server.calls
    assert "resume" not in call
    assert "id" not in call
    assert call["config"]["continues"] == {"wandb_id": "abc", "folder": str(old)}
    out = capsys.readouterr().out
    assert "abc" in out
    assert "fresh" in out
    assert "wandb sync" not in out


@pytest.mark.parametrize("broken", ["log", "finish", "define_metric"])
def test_wandb_that_breaks_on_the_way_is_one_message_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, broken
):
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError("the service has died\nsecond line")

    server = Online(())
    monkeypatch.setattr(wandb, "init", server.init)
    monkeypatch.setattr(server, broken, fail)
    finished(tmp_path, config("online"), (1, 2, 3))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    message = capsys.readouterr().err
    assert message.count("the service has died") == 1
    assert "second line" not in message


def test_an_offline_run_whose_wandb_breaks_says_where_the_rest_is(tmp_path, read_wandb, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError("the service has died")

    log = MetricsLog(tmp_path, config())
    log(1, {"train/loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", fail)
        log(2, {"train/loss": 0.5})
    log(3, {"train/loss": 0.3})
    log.close()
    captured = capsys.readouterr()
    assert captured.err.count("the service has died") == 1
    assert synced_folder(captured.out).is_dir()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    wandb.finish()
    assert [line["train/step"] for line in read_wandb(tmp_path).history] == [1]


WIDTH = "{d_model:16,layers:1,heads:2,kv_heads:2,d_ff:16}"


def options(place: Path, *arguments: str) -> list[str]:
    return [
        *arguments,
        "data=text",
        f"data.path={place / 'text.txt'}",
        f"data.cache={place / 'cache'}",
        f"output_root={place / 'out puts'}",
        "logger.log_every=1",
        "hardware=cpu",
        "model.vocab_size=300",
        "model.seq_len=8",
        f"model.complex={WIDTH}",
        "train.batch_size=1",
        "train.eval_every=0",
        "train.sample_tokens=0",
        "stage.precision=fp32",
    ]


@pytest.fixture
def place(tmp_path) -> Path:
    return write_text(tmp_path).parent


@pytest.mark.slow
def test_an_interrupted_run_prints_how_it_is_uploaded_and_all_it_logged_is_there(place, read_wandb):
    arguments = options(place, "train.steps=1000000")
    environment = {"WANDB_MODE": "offline"}
    training = Copies(place / "output", [environment], be_command, "train.py", arguments, place, os.setsid)

    def logged() -> bool:
        logs = list(place.glob("out puts/train/*/*/metrics.jsonl"))
        return bool(logs) and logs[0].read_text().count("\n") > 5

    try:
        wait_until(logged, training.alive)
        # As Ctrl-C does it, W&B's own process gets the signal, too.
        os.killpg(training.processes[0].pid, signal.SIGINT)
    finally:
        statuses, (out,) = training.wait(), training.out()
    assert statuses == [130], training.err()
    folder = synced_folder(out)
    assert out.rstrip().splitlines()[-1].startswith("wandb sync")
    (run,) = place.glob("out puts/train/*/*")
    assert folder.parent == run / "wandb"
    uploaded = read_wandb(run)
    steps = [line["train/step"] for line in uploaded.history if "train/loss" in line]
    assert steps == [line["step"] for line in read_metrics(run)]
    assert uploaded.exit_code == 1


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_a_group(place, read_wandb, monkeypatch, capfd):
    status = commands_here(monkeypatch, place)("train.py", options(place, "-m", "train.steps=1,2"))
    out, err = capfd.readouterr()
    assert status == 0, err
    (sweep,) = place.glob("out puts/train/sweep/*")
    runs = [path.parent for path in sweep.glob("*/metrics.jsonl")]
    assert len(runs) == 2
    assert {read_wandb(run).run.run_group for run in runs} == {sweep.name}
    assert out.count("wandb sync ") == 2
