import csv
import json

from support.processes import copying_context

from muse.benchmarks.presentation import METRICS
from muse.report import sweep
from muse.report.sweep import (
    read_cells,
    record_cell,
    record_metrics,
    record_search,
    show_cells,
    swept_options,
)
from muse.report.sweep_plot import Metric


def test_every_cell_is_in_the_summary_also_one_that_failed(tmp_path):
    record_metrics(tmp_path, METRICS)
    record_cell(tmp_path, 0, ["stage='1'", "benchmark.seq_len=8"], {"vram_gb": 1.0}, "measured")
    record_cell(tmp_path, 2, ["stage='1'", "benchmark.seq_len=32"], {"vram_gb": 2.0}, "reused")
    cells = record_cell(
        tmp_path, 1, ["stage='1'", "benchmark.seq_len=16"], {"error": "out of memory"}, "failed"
    )
    assert swept_options(cells) == ["benchmark.seq_len"]
    assert json.loads((tmp_path / "summary.json").read_text()) == cells
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["stage"], row["benchmark.seq_len"], row["status"], row["vram_gb"]) for row in rows] == [
        ("1", "8", "measured", "1.0"),
        ("1", "16", "failed", ""),
        ("1", "32", "reused", "2.0"),
    ]
    assert rows[1]["error"] == "out of memory"
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split() for line in show_cells(cells).splitlines()[2:]] == [
        ["8", "measured", "1"],
        ["16", "failed", "-"],
        ["32", "reused", "2"],
        ["16:", "out", "of", "memory"],
    ]


def test_a_sweep_draws_the_metrics_that_were_recorded(tmp_path):
    record_cell(tmp_path, 0, ["seed=0"], {"vram_gb": 1.0}, "measured")
    assert not (tmp_path / "summary.png").exists()
    record_metrics(tmp_path, [Metric("vram_gb", "peak memory [GB]", beside={"other": "beside"})])
    record_cell(tmp_path, 0, ["seed=0"], {"vram_gb": 1.0}, "measured")
    assert (tmp_path / "summary.png").exists()


def test_many_numbers_stand_below_each_other_with_the_factor_between_two_cells(tmp_path):
    numbers = {f"number_{i}": float(i) for i in range(13)}
    record_cell(tmp_path, 0, ["model=simple"], {"parameters": 2, "fits": True, **numbers}, "measured")
    cells = record_cell(
        tmp_path, 1, ["model=scaled"], {"parameters": 10, "fits": True, **numbers}, "measured"
    )
    lines = [line.split() for line in show_cells(cells).splitlines()]
    assert lines[0] == ["model", "simple", "scaled", "ratio"]
    assert lines[2] == ["status", "measured", "measured", "-"]
    assert lines[3] == ["parameters", "2", "10", "5"]
    assert lines[4] == ["fits", "yes", "yes", "-"]
    assert len(lines) == 3 + 2 + 13
    cells = record_cell(tmp_path, 2, ["model=other"], {"parameters": 3}, "measured")
    assert show_cells(cells).splitlines()[0].split() == ["model", "simple", "scaled", "other"]


def test_what_a_cell_ends_with_takes_the_place_of_what_it_began_with(tmp_path):
    record_cell(tmp_path, 0, ["seed=0"], {}, "unfinished")
    (cell,) = record_cell(tmp_path, 0, ["seed=0"], {"ppl": 2.0}, "trained")
    assert (cell["status"], cell["ppl"]) == ("trained", 2.0)


def record_many(folder, first, start):
    start.wait()
    for number in range(first, 12, 4):
        record_cell(folder, number, [f"seed={number}"], {}, "trained")


def test_no_cell_is_lost_when_processes_end_theirs_at_once(tmp_path):
    context = copying_context()
    start = context.Barrier(4)
    processes = [context.Process(target=record_many, args=(tmp_path, first, start)) for first in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cells = json.loads((tmp_path / "summary.json").read_text())
    assert [cell["options"]["seed"] for cell in cells] == [str(number) for number in range(12)]
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["seed"] for row in rows] == [str(number) for number in range(12)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cell_that_comes_while_the_summary_is_written_is_in_it(tmp_path, monkeypatch):
    """What another process writes between this one's reading and its writing must not be overwritten."""
    plain = sweep.write_json
    others = iter([1])

    def late(path, value):
        if path.name == sweep.SUMMARY and next(others, None):
            record_cell(tmp_path, 1, ["seed=1"], {}, "trained")
        plain(path, value)

    monkeypatch.setattr(sweep, "write_json", late)
    record_cell(tmp_path, 0, ["seed=0"], {}, "trained")
    assert json.loads((tmp_path / "summary.json").read_text()) == read_cells(tmp_path)
    assert len(read_cells(tmp_path)) == 2


def test_the_picture_of_a_search_is_another_one(tmp_path):
    pictures = []
    for searched in ({}, {"optim.lr": True}):
        record_search(tmp_path, searched)
        record_cell(tmp_path, 0, ["optim.lr=0.001"], {"valid_loss": 3.0}, "trained")
        record_cell(tmp_path, 1, ["optim.lr=0.1"], {"error": "it diverged"}, "failed")
        pictures.append((tmp_path / "summary.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_what_measured_nothing_that_can_be_drawn_has_no_picture(tmp_path):
    record_cell(tmp_path, 0, ["seed=0"], {"error": "out of memory"}, "failed")
    record_search(tmp_path, {"seed": False})
    record_cell(tmp_path, 0, ["seed=0"], {"error": "out of memory"}, "failed")
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "summary.png").exists()


def test_a_sweep_of_one_cell_has_a_summary_like_any_other(tmp_path):
    (cell,) = record_cell(tmp_path, 0, ["seed=3"], {"valid_loss": 2.0}, "trained")
    assert json.loads((tmp_path / "summary.json").read_text()) == [cell]
    assert [line.split() for line in show_cells([cell]).splitlines()] == [
        ["cell", "status", "valid_loss"],
        ["----", "-------", "----------"],
        ["0", "trained", "2"],
    ]
    assert (tmp_path / "summary.csv").read_text() == "seed,status,valid_loss\n3,trained,2.0\n"
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
