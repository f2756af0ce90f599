from __future__ import annotations

import json
import math

import pytest

from muse.config import LoggerConfig, RunConfig
from muse.report import metrics
from muse.report.metrics import FILE, MetricsLog, read_metrics


def config(mode: str = "disabled") -> RunConfig:
    return RunConfig(logger=LoggerConfig(mode=mode))


def write_lines(run, steps) -> list[dict[str, float]]:
    log = MetricsLog(run, config())
    for step in steps:
        log(step, {"train/loss": 1 / step})
    log.close()
    return [{"step": step, "train/loss": 1 / step} for step in steps]


def test_every_line_is_there_as_soon_as_it_is_logged(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run", config())
    for step in (1, 2):
        log(step, {"a": step / 3, "b": 2.0})
        assert read_metrics(tmp_path / "new" / "run")[-1] == {"step": step, "a": step / 3, "b": 2.0}
    log.close()
    assert len(read_metrics(tmp_path / "new" / "run")) == 2


def test_a_continued_run_takes_over_earlier_lines(tmp_path):
    lines = write_lines(tmp_path / "old", (1, 3))
    log = MetricsLog(tmp_path / "new", config(), lines)
    log(5, {"train/loss": 0.0})
    log.close()
    assert read_metrics(tmp_path / "new") == [*lines, {"step": 5, "train/loss": 0.0}]
    assert read_metrics(tmp_path / "old") == lines


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
    lines = write_lines(tmp_path, (1, 2, 3))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert read_metrics(tmp_path) == lines[:2]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_what_json_cannot_say_is_null(tmp_path):
    log = MetricsLog(tmp_path, config())
    log(1, {"ppl": math.inf, "norm": math.nan, "loss": 2.5})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / FILE).read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "ppl": None, "norm": None, "loss": 2.5}


def test_wandb_that_does_not_start_is_only_a_message(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(**_: object) -> None:
        raise wandb.errors.CommError("no network\nsecond line")

    monkeypatch.setattr(wandb, "init", fail)
    log = MetricsLog(tmp_path, config("online"), wandb_id="abc")
    log(1, {"train/loss": 1.0})
    log.add_results({"loss": 1.0}, [])
    log.close(failed=True)
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 1.0}]
    assert log.wandb_id == "abc"
    message = capsys.readouterr().err
    assert "no network" in message
    assert "second line" not in message
    assert str(tmp_path / FILE) in message
    assert message.count("\n") == 1


def test_wandb_is_not_asked_when_it_is_disabled(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("W&B was started"))
    log = MetricsLog(tmp_path, config("disabled"), wandb_id="abc")
    log(1, {"train/loss": 1.0})
    log.add_results({"loss": 1.0}, [])
    log.close()
    assert log.wandb_id == "abc"


def test_wandb_gets_what_the_file_gets(tmp_path, monkeypatch):
    import wandb

    calls = []

    class Run:
        id = "id-of-run"
        offline = False
        settings = wandb.Settings()
        summary: dict[str, object] = {}

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, values: dict[str, object]) -> None:
            calls.append(values)

        def finish(self, exit_code: int) -> None:
            calls.append({"finish": exit_code})

    options = {}
    monkeypatch.setattr(wandb, "init", lambda **given: options.update(given) or Run())
    log = MetricsLog(tmp_path, config("online"))
    log(3, {"train/loss": 1.0})
    log.add_results({"loss": 0.5, "valid": {"nested": 1}}, [tmp_path / "missing.png"])
    log.close(failed=True)
    assert options["mode"] == "online"
    assert options["config"]["train"]["steps"] == config().train.steps
    assert calls[0] == {"train/step": 3, "train/loss": 1.0}
    assert calls[-1] == {"finish": 1}
    assert Run.summary == {"loss": 0.5}
    assert log.wandb_id == "id-of-run"


def test_wandb_offline_writes_into_the_run_folder(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    log = MetricsLog(run, config("offline"))
    log(1, {"train/loss": 1.0})
    log.close()
    assert log.wandb_id is not None
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    assert log.wandb_id in file.name


class Noted:
    """A tracker that notes what it is given, and fails from some step on."""

    def __init__(self, fails_at: float = math.inf) -> None:
        self.fails_at, self.steps, self.results, self.failed = fails_at, [], [], None

    def log(self, step, metrics) -> None:
        if step >= self.fails_at:
            raise RuntimeError("full\nsecond line")
        self.steps.append(step)

    def add_results(self, values, images, tables) -> None:
        self.results.append((values, images))

    def close(self, failed) -> None:
        self.failed = failed


def test_one_tracker_that_breaks_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    broken, whole = Noted(fails_at=2), Noted()
    monkeypatch.setattr(metrics, "TensorboardTracker", lambda *_: broken)
    monkeypatch.setattr(metrics, "CsvTracker", lambda *_: whole)
    log = MetricsLog(tmp_path, RunConfig(logger=LoggerConfig(tensorboard=True, csv=True)))
    for step in (1, 2, 3):
        log(step, {"loss": 1.0})
    (tmp_path / "there.png").touch()
    log.add_results({"loss": 1.0}, [tmp_path / "there.png", tmp_path / "missing.png"])
    log.close(failed=True)
    assert (broken.steps, broken.results, broken.failed) == ([1], [], None)
    assert (whole.steps, whole.failed) == ([1, 2, 3], True)
    assert whole.results == [({"loss": 1.0}, [tmp_path / "there.png"])]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err == f"TensorBoard is left out (full); metrics are in {tmp_path / FILE}\n"


def test_nothing_is_beside_the_file_unless_it_is_asked_for(tmp_path):
    log = MetricsLog(tmp_path, RunConfig())
    log(1, {"loss": 1.0})
    log.add_results({"loss": 1.0}, [])
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
