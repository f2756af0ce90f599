from __future__ import annotations

import math

import pytest

from muse.report.plots import (
    draw_lines,
    draw_ratios,
    draw_stacked,
    save,
    subtracted,
)

POINTS = {"one": [(0.0, 1.0), (1.0, 3.0)], "two": [(0.0, 2.0), (1.0, 2.5)]}


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"empty": []},
        POINTS,
        {"one point": [(1.0, 2.0)]},
        {"long": [(float(x), x**0.5) for x in range(100)], "empty": []},
        {"bad": [(0.0, math.nan), (1.0, math.inf), (2.0, 1.0), (3.0, None)]},
    ],
    ids=["nothing", "empty", "two", "point", "long", "not finite"],
)
def test_lines_give_a_png(tmp_path, pixels, lines):
    def picture(*options):
        path = tmp_path / "plot.png"
        save(draw_lines("title", "x", "y", *options), path)
        return pixels(path)

    drawn = [picture(lines, log) for log in (False, True)]
    if any(len(points) > 0 for points in lines.values()):
        assert picture({}) not in drawn


def test_lines_that_coincide_are_told_apart_and_named_at_their_ends(overlapping):
    names = [f"line {number}" for number in range(7)]
    figure = draw_lines("title", "x", "y", dict.fromkeys(names, POINTS["one"]))
    (axes,) = figure.axes
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(styles) == len(names)
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        line.get_label(): line.get_color() for line in axes.lines
    }
    assert overlapping(figure, axes.texts) == []
    assert overlapping(figure, [axes.patch, *axes.texts[:1]]) == []


def test_a_name_stands_where_its_line_ends():
    lines = {"low": [(0, 5.0), (1, 1.0)], "high": [(0, 1.0), (1, 9.0), (2, None)], "empty": []}
    figure = draw_lines("title", "x", "y", lines)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["low", "high"]
    for text in axes.texts:
        (_, end) = axes.transData.inverted().transform(axes.transAxes.transform(text.xy))
        last = [y for _, y in lines[text.get_text()] if y is not None][-1]
        assert end == pytest.approx(last)


def test_the_limit_of_lines_is_in_sight_and_named():
    figure = draw_lines("title", "x", "y", {"one": [(0, 1e-7), (1, 1e-6)]}, log=True, limit=("allowed", 5e-5))
    (axes,) = figure.axes
    limit = axes.lines[-1]
    assert set(limit.get_ydata()) == {5e-5}
    low, high = axes.get_ylim()
    assert low < 1e-7 < 5e-5 < high
    assert "allowed" in [text.get_text() for text in axes.texts]


def test_differences_have_a_panel_and_the_colours_of_their_lines():
    differences = {"two": subtracted(POINTS["two"], POINTS["one"])}
    figure = draw_lines("title", "x", "y", POINTS, differences=("difference to one", differences))
    above, below = figure.axes
    (line,) = [line for line in below.lines if line.get_label() == "two"]
    assert list(line.get_ydata()) == [1.0, -0.5]
    assert line.get_color() == above.lines[1].get_color()
    assert below.get_ylabel() == "difference to one"
    assert len(draw_lines("title", "x", "y", POINTS, differences=("nothing", {})).axes) == 1


def test_what_is_not_known_of_both_has_no_difference():
    assert subtracted([(1, 5.0), (2, None), (3, 4.0)], [(1, 4.5), (2, 1.0), (3, None)]) == [(1, 0.5)]


BARS = {"exact, verified": {"parameters": 1.0, "state": 2.0}, "stage 0": {"parameters": 4.0, "state": 0.0}}


def test_stacked_bars_begin_at_zero_and_tell_their_sum():
    (axes,) = draw_stacked("title", "GB", BARS).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(BARS)
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlabel() == "GB"
    assert [text.get_text() for text in axes.texts] == ["3", "4"]
    second = axes.containers[1]
    assert [(bar.get_x(), bar.get_width()) for bar in second] == [(1.0, 2.0), (4.0, 0.0)]


def test_the_limit_of_bars_is_in_sight_and_in_the_legend():
    figure = draw_stacked("title", "GB", BARS, ("half of stage 0", 9.0))
    (axes,), (legend,) = figure.axes, figure.legends
    assert set(axes.lines[0].get_xdata()) == {9.0}
    assert axes.get_xlim()[1] > 9
    assert [text.get_text() for text in legend.get_texts()] == ["parameters", "state", "half of stage 0: 9"]


@pytest.mark.parametrize("count", [0, 1, 12])
def test_no_legend_or_name_lies_on_the_bars(tmp_path, overlapping, pixels, count):
    bars = {f"a model with a long name {number}": BARS["stage 0"] for number in range(count)}
    rows = {name: {f"alternative {part}": 2.0 + part for part in range(8)} for name in bars}
    for figure in (
        draw_stacked("title", "GB", bars, ("limit", 5.0)),
        draw_ratios("title", "time of the alternative / ours", rows),
    ):
        (axes,) = figure.axes
        assert overlapping(figure, [axes.patch, axes.title, axes.xaxis.label, *figure.legends]) == []
        assert overlapping(figure, axes.get_yticklabels()) == []
        save(figure, tmp_path / "plot.png")
        pixels(tmp_path / "plot.png")


def test_ratios_are_bars_from_one_with_a_colour_a_name():
    rows = {"linear": {"eager": 2.0, "bare": 0.5}, "norm": {"eager": 4.0}, "flow": {}}
    figure = draw_ratios("title", "x", rows)
    (axes,), (legend,) = figure.axes, figure.legends
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, 1.0), (1, -0.5), (1, 3.0)]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in legend.get_texts()] == ["eager", "bare"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(rows)


def test_no_figure_is_kept(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    save(draw_lines("title", "x", "y", POINTS), tmp_path / "plot.png")
    assert pyplot.get_fignums() == before
