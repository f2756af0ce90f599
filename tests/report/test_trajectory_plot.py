from __future__ import annotations

import numpy as np
import pytest

from muse.report import trajectory_plot
from muse.report.trajectory_plot import COLUMNS, MOST_PANELS, plot_trajectories

HALVES = ("kick", "drift", "kick")
LIMIT = ("allowed", 5e-5)


@pytest.fixture
def draw(tmp_path, pixels, monkeypatch):
    """The figure of some energies, which is also saved."""
    figures, save = [], trajectory_plot.save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(trajectory_plot, "save", keep)

    def drawn(energies):
        plot_trajectories(tmp_path / "energy.png", energies, HALVES, 0.5, LIMIT, "title")
        pixels(tmp_path / "energy.png")
        return figures[-1]

    return drawn


def moving(steps: int, tokens: int) -> np.ndarray:
    """Token n is at -n at the start, and 1 % further with each kick or drift."""
    points = np.arange(1 + len(HALVES) * steps)[:, None]
    return -np.arange(1, tokens + 1) * (1 + 0.01 * points)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_line_is_the_relative_change_of_a_token_and_marks_are_whole_steps(draw, tokens):
    figure = draw({"block 0": moving(2, tokens)})
    axes, bar = figure.axes
    lines, marks = axes.collections
    # The start, where nothing has changed, is left out.
    found = lines.get_segments()
    assert len(found) == tokens
    for path in found:
        np.testing.assert_allclose(path[:, 0] * len(HALVES), np.arange(1, 7))
        np.testing.assert_allclose(path[:, 1], 0.01 * np.arange(1, 7))
    shown = marks.get_offsets().compressed().reshape(-1, 2)
    np.testing.assert_allclose(np.unique(shown[:, 0]), [1, 2])
    assert [line.get_ydata()[0] for line in axes.lines] == [LIMIT[1]]
    assert axes.get_ylim()[0] < LIMIT[1] < 0.06 < axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == 2 * list(HALVES)
    assert axes.get_xlabel() == "2 steps of dt = 0.5"
    assert bar.get_ylabel() == "generated token"
    assert all(tick == int(tick) for tick in bar.get_yticks())
    assert lines.get_clim()[0] == 1
    assert list(lines.get_array()) == list(range(1, tokens + 1))


def test_many_steps_are_numbered(draw):
    figure = draw({"block 0": moving(20, 2)})
    ticks = figure.axes[0].get_xticks()
    assert all(tick == int(tick) for tick in ticks)


def test_no_name_hides_another_however_many_flows_there_are(draw, overlapping):
    for flows in (1, 2, COLUMNS + 1, MOST_PANELS, 5 * MOST_PANELS):
        figure = draw({f"block {n}, flow 0": moving(1, 3) for n in range(flows)})
        panels = figure.axes[:-1]
        assert len(panels) == min(flows, MOST_PANELS)
        assert panels[0].get_title().startswith("block 0, flow 0")
        assert panels[-1].get_title().startswith(f"block {flows - 1}, flow 0")
        assert ("12 of 60 flows" in figure.get_suptitle()) == (flows > MOST_PANELS)
        labels = [label for axes in panels for label in (axes.title, *axes.get_xticklabels())]
        assert overlapping(figure, labels) == []


def test_what_does_not_move_and_what_is_lost_harm_no_other_token(draw):
    energies = moving(1, 3)
    energies[:, 0] = 5.0
    energies[2:, 1] = np.nan
    lines = draw({"block 0": energies}).axes[0].collections[0]
    last = [segment[-1, 1] if len(segment) else None for segment in lines.get_segments()]
    assert last[-1] == pytest.approx(0.03)
