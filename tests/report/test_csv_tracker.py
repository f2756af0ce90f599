"""metrics.csv as csv.DictReader reads it, after each line."""

from __future__ import annotations

import csv
import math
import os

import pytest

from muse import files
from muse.config import LoggerConfig, RunConfig
from muse.report.csv_tracker import FILE
from muse.report.metrics import MetricsLog, read_metrics

CONFIG = RunConfig(logger=LoggerConfig(csv=True))


def read_csv(run) -> list[dict[str, str]]:
    """The rows; every one has as many cells as there are columns."""
    with open(run / FILE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def numbers(rows) -> list[dict[str, float]]:
    """The cells that are not empty."""
    return [{key: float(cell) for key, cell in row.items() if cell} for row in rows]


def test_every_line_is_a_row_as_soon_as_it_is_logged_also_with_new_metrics(tmp_path):
    log = MetricsLog(tmp_path, CONFIG)
    assert read_csv(tmp_path) == []
    lines = [
        (1, {"train/loss": 1 / 3}),
        (2, {"train/loss": 0.1}),
        (2, {"valid/loss": 1e-30}),
        (3, {"x": 1.0}),
    ]
    lines.append((3, {"train/loss": 0.5, "valid/loss": 2.0}))
    for number, (step, metrics) in enumerate(lines, 1):
        log(step, metrics)
        assert numbers(read_csv(tmp_path)) == [{"step": s, **m} for s, m in lines[:number]]
    log.close()
    assert list(read_csv(tmp_path)[0]) == ["step", "train/loss", "valid/loss", "x"]
    assert numbers(read_csv(tmp_path)) == read_metrics(tmp_path)


def test_what_is_not_finite_is_an_empty_cell(tmp_path):
    log = MetricsLog(tmp_path, CONFIG)
    log(1, {"loss": math.nan, "ppl": math.inf, "lr": 1.0})
    log.close()
    assert read_csv(tmp_path) == [{"step": "1", "loss": "", "ppl": "", "lr": "1.0"}]


def test_a_continued_run_has_the_earlier_rows_first(tmp_path):
    earlier = [{"step": 1, "a": 0.5}, {"step": 2, "b": None, "c": 1.5}]
    log = MetricsLog(tmp_path, CONFIG, earlier)
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2"]
    log(3, {"c": 2.0, "d": 3.0})
    log.close()
    assert list(read_csv(tmp_path)[0]) == ["step", "a", "b", "c", "d"]
    assert numbers(read_csv(tmp_path)) == [
        {"step": 1, "a": 0.5},
        {"step": 2, "c": 1.5},
        {"step": 3, "c": 2, "d": 3},
    ]


def test_a_run_that_is_killed_while_a_column_is_added_has_all_rows_before(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path, CONFIG)
    log(1, {"a": 1.0})

    def killed(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        log(2, {"b": 1.0})
    log(3, {"a": 2.0})
    log.close()
    assert numbers(read_csv(tmp_path)) == [{"step": 1, "a": 1}]
    assert sorted(os.listdir(tmp_path)) == [FILE, "metrics.jsonl"]
    assert (
        capsys.readouterr().err
        == f"metrics.csv is left out (killed); metrics are in {tmp_path / 'metrics.jsonl'}\n"
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    log = MetricsLog(tmp_path, CONFIG)
    log(1, {"a": 1.0})
    log(2, {"b": 2.5})
    log.close()
    table = pandas.read_csv(tmp_path / FILE)
    assert list(table.columns) == ["step", "a", "b"]
    assert table["b"].dropna().tolist() == [2.5]
