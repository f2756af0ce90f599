from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from muse.benchmarks.energy import DRIFT_TARGET
from muse.benchmarks.presentation import tables as tables_of
from muse.benchmarks.results import Results
from muse.benchmarks.suite import measure_isolated
from muse.benchmarks.vram import HOLDERS
from muse.config import LoggerConfig, RunConfig
from muse.launch.bench import composed_stage
from muse.report.metrics import MetricsLog
from muse.report.wandb_tables import ResultTable

TIMES = [0.0, 0.1, 0.2]
ENERGY = {
    "times": TIMES,
    "integrator": "yoshida4",
    "energy_trajectory": [30.0, 30.5, 30.25],
    "drift_trajectory": [0.0, 1e-6, 0.0],
    "leapfrog_drift_trajectory": [0.0, 1e-3, 1e-2],
    "max_drift": 1e-6,
}
HOLDS = dict(zip(HOLDERS, (1.0, 2.0, 3.0, 0.5), strict=True))
KERNEL = {
    "alternatives": {
        "ours": {"forward_ms_p50": 1.0, "training_ms_p50": 2.0, "training_ratio": 1.0},
        "eager": {"forward_ms_p50": 2.0, "training_ms_p50": 6.0, "training_ratio": 3.0, "note": "slow"},
    },
    "error": None,
}
DETAILS = {
    "vram": {"exact": {"peak": 6.5, **HOLDS}, "reversible": {"peak": None}},
    "perplexity": {
        "stage 1": {"ppl": 20.0, "trained": "2 steps", "curve": [[1, 5.0], [2, None]]},
        "stage 0": {"ppl": 21.0, "trained": "2 steps", "curve": [], "parameters": 7},
    },
    "speedup": {"plain": {"seconds": 3.0, "curve": [(1, 4.0)], "texts": {"sample": "a"}}},
    "energy": {"trained": ENERGY},
    "kernels": {"norm": KERNEL, "flow": {"family": "flow", "error": "wrong: q is off"}},
}
CRITERIA = [("perplexity", 0.97, "<= 1.03", True), ("operations", "3 of 4", "all", None)]


def result_tables(details, criteria):
    results = Results(Path("unused"), measure_isolated, composed_stage, details=details, criteria=criteria)
    return tables_of(results)


@pytest.fixture
def tables() -> dict[str, ResultTable]:
    found = result_tables(DETAILS, CRITERIA)
    assert len({table.name for table in found}) == len(found)
    return {table.name: table for table in found}


def column(table: ResultTable, name: str) -> list[object]:
    return [row[table.columns.index(name)] for row in table.rows]


def test_every_row_fits_its_columns_and_every_plot_its_table(tables):
    for table in tables.values():
        assert len(set(table.columns)) == len(table.columns)
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert set(table.bar or ()) | set(table.lines or ()) <= set(table.columns)


def test_models_stand_beside_each_other_by_all_that_is_one_value(tables):
    table = tables["perplexity"]
    assert table.columns == ("model", "ppl", "trained", "parameters")
    assert table.rows == [["stage 1", 20.0, "2 steps", None], ["stage 0", 21.0, "2 steps", 7]]
    assert table.bar == ("model", "ppl")
    assert "texts" not in tables["speedup"].columns


def test_the_parts_of_a_peak_add_up_to_it(tables):
    table = tables["memory"]
    assert set(column(table, "model")) == {"exact"}
    assert sum(column(table, "GB")) == DETAILS["vram"]["exact"]["peak"]
    assert len(set(column(table, "part"))) == len(HOLDERS)


def test_trajectories_of_the_energy(tables):
    energy = tables["energy trajectory"]
    assert list(zip(column(energy, "time"), column(energy, "energy"), strict=True)) == list(
        zip(TIMES, ENERGY["energy_trajectory"], strict=True)
    )
    drift = tables["energy drift"]
    assert drift.rows == [
        ["trained, yoshida4", 0.1, pytest.approx(-6)],
        ["trained, leapfrog", 0.1, pytest.approx(-3)],
        ["trained, leapfrog", 0.2, pytest.approx(-2)],
        *(["allowed", time, pytest.approx(math.log10(DRIFT_TARGET))] for time in (0.1, 0.2)),
    ]


def test_an_operation_that_failed_is_there_with_its_error(tables):
    remarks = dict(zip(column(tables["kernels"], "case"), column(tables["kernels"], "remark"), strict=True))
    assert remarks == {"norm, ours": None, "norm, eager": "slow", "flow, -": "wrong: q is off"}


def test_nothing_measured_gives_no_table():
    assert result_tables({}, []) == []


def test_wandb_holds_every_table_and_plot_with_its_rows(tmp_path, read_wandb, tables, capsys):
    log = MetricsLog(tmp_path, RunConfig(logger=LoggerConfig(mode="offline")))
    log.add_results({"ppl": 20.0}, [], list(tables.values()))
    log.close()
    assert capsys.readouterr().err == ""
    uploaded = read_wandb(tmp_path)
    assert uploaded.summary["ppl"] == 20.0
    logged = {key for line in uploaded.history for key in line}
    for name, table in tables.items():
        assert f"tables/{name}/path" in logged
        drawn = table.bar is not None or table.lines is not None
        assert any(key.startswith(f"plots/{name}") for key in logged) == drawn
        (path,) = {line.get(f"tables/{name}/path") for line in uploaded.history} - {None}
        (folder,) = tmp_path.glob("wandb/offline-run-*")
        written = json.loads((folder / "files" / Path(path)).read_text())
        assert written["columns"] == list(table.columns)
        assert written["data"] == json.loads(json.dumps(table.rows))
