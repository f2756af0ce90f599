"""The pictures of the README: drawn from the committed figures, which say how they were measured."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from support.commands import run_here
from support.processes import ROOT

from muse.benchmarks.energy import DRIFT_TARGET
from muse.report.readme_pictures import KEYS, read_figures

FIGURES, PICTURES = ROOT / "docs" / "figures", ROOT / "docs" / "pictures"
FILES = sorted(FIGURES.glob("*.json"))
# GitHub shows three of them side by side on the first page that anybody sees.
MOST_BYTES = 60_000


def draw(figures: Path, pictures: Path) -> int:
    return run_here("muse.report.readme_pictures", [str(figures), str(pictures)])


def test_the_command_draws_every_committed_picture(tmp_path, capsys):
    assert draw(FIGURES, tmp_path) == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in PICTURES.iterdir()} == {f"{file.stem}.svg" for file in FILES}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"docs/pictures/([\w.]+)", readme)) == drawn
    for path in tmp_path.iterdir():
        ElementTree.parse(path)
        assert path.stat().st_size < MOST_BYTES
        assert (PICTURES / path.name).stat().st_size < MOST_BYTES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_figures_say_how_they_were_measured(file):
    told = read_figures(file)
    assert all(told[key] for key in ("what", "commands", "machine", "date", "commit", "versions"))
    assert all(len(points) > 2 for points in told["lines"].values())
    # A command is one that any reader can give, without folders of whoever measured.
    assert not re.search(r"(?<![\w<])/\w", file.read_text())


def test_the_figures_are_those_that_the_readme_speaks_of():
    memory, energy, loss = (
        read_figures(FIGURES / f"{name}.json")["lines"] for name in ("memory", "energy", "loss")
    )
    assert set(memory) == {"backprop", "checkpoint", "reversible", "exact"}
    assert len({peak for _, peak in memory["exact"]}) == 1
    assert memory["backprop"][-1][1] > 10 * memory["backprop"][0][1]
    assert max(drift for _, drift in energy["order 4"]) < DRIFT_TARGET
    assert read_figures(FIGURES / "energy.json")["limit"]["value"] == DRIFT_TARGET
    assert set(loss) == {"stage 0", "stage 1", "stage 2"}
    assert len({points[-1][0] for points in loss.values()}) == 1


@pytest.mark.parametrize("text", ["{", "[]", json.dumps(dict.fromkeys(KEYS[1:]))])
def test_a_file_without_figures_is_one_sentence(tmp_path, capsys, text):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "memory.json").write_text(text)
    assert draw(tmp_path / "figures", tmp_path / "pictures") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "pictures").exists()


def test_a_folder_without_figures_is_one_sentence(tmp_path, capsys):
    assert draw(tmp_path, tmp_path / "pictures") == 1
    assert "has no figures" in capsys.readouterr().err
