from __future__ import annotations

import itertools
import math

from muse.report import run_plot
from muse.report.run_plot import (
    plot_contradiction,
    plot_flow,
    plot_half_lives,
    plot_levels_read,
    plot_loss_curve,
)


def test_a_loss_curve_leaves_out_what_was_not_measured(tmp_path, pixels):
    metrics = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": None},
        {"step": 3, "train/loss": 2.0},
        {"step": 3, "valid/loss": 2.5},
    ]
    drawings = []
    for lines in (
        metrics,
        [line for line in metrics if line.get("train/loss", 0) is not None],
        metrics[:3],
        [],
    ):
        plot_loss_curve(tmp_path / "loss.png", lines, "title")
        drawings.append(pixels(tmp_path / "loss.png"))
    assert drawings[0] == drawings[1]
    assert len(set(drawings)) == 3


def drawn(monkeypatch) -> list:
    """The figures that are saved from now on."""
    figures, save = [], run_plot.save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(run_plot, "save", keep)
    return figures


def test_the_loss_curve_shows_what_comes_after_the_first_steps(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    metrics = [{"step": step, "train/loss": 4 + 5 * math.exp(-step / 3)} for step in range(1, 101)]
    metrics += [
        {"step": step, "valid/loss": 4.2, "valid/tokens": 64, "valid/stride": 8} for step in (50, 100)
    ]
    metrics += [{"step": 100, "valid/loss": 4.6, "valid/tokens": 32, "valid/stride": 8}]
    metrics += [{"step": 100, "valid/whole_loss": 4.3}]
    plot_loss_curve(tmp_path / "loss.png", metrics, "title")
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    assert low < 4 < 4.6 < high < 6
    assert "from 7.58" in [text.get_text() for text in axes.texts]
    # Losses that were measured on other windows are not joined.
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["validation, 64 tokens"] == [4.2, 4.2]
    assert lines["validation, 32 tokens"] == [4.6]
    assert lines["validation, whole split"] == [4.3]


def test_the_loss_curve_of_a_slow_start_shows_all(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_loss_curve(tmp_path / "loss.png", [{"step": i, "train/loss": 8 - i / 50} for i in range(1, 101)], "")
    low, high = figures[0].axes[0].get_ylim()
    assert low < 6 < 8 - 1 / 50 < high


def test_every_flow_is_drawn_and_named_in_every_panel(tmp_path, pixels, monkeypatch):
    figures = drawn(monkeypatch)
    keys = ("energy", "drift_max", "curvature_dt2", "fallen_back")
    names = [f"blocks_{block}_flow_{flow}" for block in range(3) for flow in range(2)]
    metrics = [
        {"step": step, "train/loss": 1.0, **{f"flow/{name}/{key}": 0.5 for name in names for key in keys}}
        for step in (10, 20)
    ]
    metrics[1]["flow/blocks_2_flow_1/drift_max"] = None
    plot_flow(tmp_path / "flow.png", metrics, "title")
    pixels(tmp_path / "flow.png")
    for axes in figures[0].axes:
        assert len(axes.lines) == 6
        texts = axes.texts
        assert sorted(text.get_text() for text in texts) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
        # All end at one point, and no name hides another or leaves the panel.
        places = sorted(text.xy[1] for text in texts)
        assert min(b - a for a, b in itertools.pairwise(places)) > 0.02
        assert places[-1] <= 1


def test_a_run_without_flows_has_no_picture_of_them(tmp_path):
    plot_flow(tmp_path / "flow.png", [{"step": 1, "train/loss": 1.0, "flow/fallbacks": 0.0}], "title")
    assert not (tmp_path / "flow.png").exists()


def test_half_lives_are_drawn_for_each_operator(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_half_lives(tmp_path / "half_lives.png", [{"step": 1, "train/loss": 1.0}], "title")
    assert not figures
    metrics = [
        {
            "step": step,
            **{
                f"koopman/blocks_{block}_mixer/half_life_p{percent}": percent * step + block
                for block in (0, 2)
                for percent in (10, 50, 90)
            },
        }
        for step in (1, 2)
    ]
    plot_half_lives(tmp_path / "half_lives.png", metrics, "title")
    (axes,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [
        *([50, 100], [10, 20], [90, 180]),
        *([52, 102], [12, 22], [92, 182]),
    ]
    assert sorted(text.get_text() for text in axes.texts) == ["block 0", "block 2"]
    assert axes.get_yscale() == "log"


def test_what_routers_read_is_drawn_for_the_last_and_the_first_evaluation(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_levels_read(tmp_path / "levels_read.png", [{"step": 1, "train/loss": 1.0}], "title")
    assert not figures
    metrics = [
        {
            "step": step,
            **{
                f"mera/blocks_{block}_mixer/level_{level}": step / 10 + level + block
                for block in (1, 3)
                for level in (0, 1, 2)
            },
        }
        for step in (1, 2, 3)
    ]
    plot_levels_read(tmp_path / "levels_read.png", metrics, "title")
    (axes,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [
        *([1.3, 2.3, 3.3], [1.1, 2.1, 3.1]),
        *([3.3, 4.3, 5.3], [3.1, 4.1, 5.1]),
    ]
    assert all(list(line.get_xdata()) == [1, 2, 4] for line in axes.lines)
    assert sorted(text.get_text() for text in axes.texts) == ["block 1", "block 3"]


def test_the_contradiction_is_drawn_where_there_is_one(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_contradiction(tmp_path / "contradiction.png", [{"step": 1, "train/loss": 1.0}], "title")
    assert not figures
    metrics = [{"step": step, "dialectic/contradiction": 0.1 * step} for step in (1, 2)]
    plot_contradiction(tmp_path / "contradiction.png", metrics, "title")
    (axes,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.2]]
    assert axes.get_ylim()[0] == 0
