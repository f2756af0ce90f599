from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import default_stage
from support.configs import small_width

from muse.benchmarks import presentation, suite
from muse.benchmarks.results import Results
from muse.config import (
    BenchConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from muse.data import TokenData
from muse.report.dashboard import LAYOUT, build_workspace, main
from muse.report.wandb_run import STEP
from muse.report.wandb_tables import ResultTable
from muse.training.trainer import train

DOCS = Path(__file__).resolve().parents[2] / "docs" / "dashboard.md"


def keys(kind: str) -> set[str]:
    return {key for panels in LAYOUT.values() for panel in panels if panel.kind == kind for key in panel.keys}


def test_the_documentation_shows_the_layout():
    rows = [
        f"| {section} | {panel.title} | {panel.kind} | {', '.join(f'`{key}`' for key in panel.keys)} |"
        for section, panels in LAYOUT.items()
        for panel in panels
    ]
    table = "\n".join(["| section | panel | kind | shows |", "|---|---|---|---|", *rows])
    assert f"\n\n{table}\n\n" in DOCS.read_text(encoding="utf-8")


def test_lines_show_what_a_training_logs(tmp_path):
    width = small_width(layers=1, kv_heads=2)
    config = RunConfig(
        stage=StageConfig(number="2", precision="fp32", gradient="reversible", trunk="reversible"),
        model=ModelConfig("nano", 13, 8, real=width, complex=width),
        hardware=HardwareConfig(device="cpu"),
        logger=LoggerConfig(mode="disabled", log_every=1),
        train=TrainConfig(steps=1, batch_size=2),
    )
    text = (np.arange(100) % 13).astype(np.uint16)
    data = TokenData(text, text, text, vocab_size=13, tokenizer=None, counts={})
    logged: set[str] = set()
    train(
        config, data, torch.device("cpu"), tmp_path, lambda _, metrics: logged.update(metrics), progress=False
    )
    assert keys("lines") <= logged


class Anything(dict[str, Any]):
    """A measurement that has found everything."""

    def __missing__(self, key: str) -> float:
        return 1.0


def test_bars_and_tables_show_what_benchmarks_report(tmp_path, monkeypatch):
    found = {"decisions": [], "curve": [[1, 2.0]], "cases": Anything()}
    found |= {"times": [0.0], "integrator": "leapfrog", "parameters": 1.0, "peak": 1.0}
    found |= {"flow/reconstruction_error": 0.0}
    found |= {key: [1.0] for key in ("energy_trajectory", "drift_trajectory", "leapfrog_drift_trajectory")}
    monkeypatch.setattr(suite, "measure_isolated", lambda *_: Anything(found, device="cpu"))
    values: set[str] = set()
    tables: list[ResultTable] = []
    for number, activation in (*((number, "split_gelu") for number in "123"), ("3a", "gelu")):
        stage = StageConfig(number=number, activation=activation)
        report = suite.run_suite(BenchConfig(stage=stage), tmp_path, default_stage)
        values |= {key for key, value in report.values.items() if isinstance(value, int | float | str)}
        tables += presentation.tables(report)
    # benchmark=kernels is no part of benchmark=all.
    kernels = {"kernels": {"norm": {"error": "wrong"}}}
    tables += presentation.tables(Results(tmp_path, suite.measure_isolated, default_stage, details=kernels))
    assert keys("bars") <= values
    assert keys("table") <= {f"tables/{table.name}" for table in tables}


def test_the_workspace_is_built_without_network_and_holds_the_layout(monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import wandb

    monkeypatch.setattr(wandb, "Api", lambda *_, **__: pytest.fail("something went online"))
    workspace = build_workspace("project", "team")
    assert (workspace.project, workspace.entity, workspace.settings.x_axis) == ("project", "team", STEP)
    assert [section.name for section in workspace.sections] == list(LAYOUT)
    # What is sent, as JSON: every panel with its keys.
    for section, panels in zip(
        workspace._to_model().spec.section.panel_bank_config.sections, LAYOUT.values()
    ):
        assert len(section.panels) == len(panels)
        for sent, panel in zip(section.panels, panels, strict=True):
            text = sent.model_dump_json(by_alias=True, exclude_none=True)
            assert [key for key in panel.keys if f'"{key}"' not in text] == []
            if panel.kind == "lines":
                assert f'"{STEP}"' in text


def test_it_is_saved_under_the_given_names(monkeypatch, capsys):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    saved = []

    def save(self: Any) -> Any:
        saved.append((self.entity, self.project))
        self._internal_name = "nw-abc-v"
        return self

    monkeypatch.setattr(workspaces.Workspace, "save", save)
    monkeypatch.setattr(workspaces.Workspace, "url", "https://there")
    monkeypatch.setattr("sys.argv", ["dashboard", "--project=p", "--entity=team"])
    main()
    assert saved == [("team", "p")]
    assert capsys.readouterr().out == "https://there\n"


@pytest.fixture
def failure(monkeypatch, capsys):
    """The one sentence with which the command ends."""

    def run() -> str:
        monkeypatch.setattr("sys.argv", ["dashboard", "--project=p"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert capsys.readouterr().out == ""
        assert isinstance(ended.value.code, str)
        assert ended.value.code.startswith("error: ")
        assert "\n" not in ended.value.code
        return ended.value.code

    return run


def test_without_the_package_one_sentence_names_what_installs_it(monkeypatch, failure):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert 'pip install -e ".[wandb]"' in failure()


def test_without_a_login_one_sentence_says_so(monkeypatch, failure, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "wandb login" in failure()
