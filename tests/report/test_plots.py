from __future__ import annotations

import math

import pytest
from PIL import Image

from muse.report.plots import plot_lines, plot_loss_curve, plot_stacked


def pixels(path) -> bytes:
    """The pixels of a PNG, all of which must be readable."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert min(image.size) > 200
        return image.convert("RGB").tobytes()


POINTS = {"one": [(0.0, 1.0), (1.0, 3.0)], "two": [(0.0, 2.0), (1.0, 2.5)]}


@pytest.mark.parametrize(
    "lines",
    [
        {},
        {"empty": []},
        POINTS,
        {"one point": [(1.0, 2.0)]},
        {"long": [(float(x), x**0.5) for x in range(100)], "empty": []},
        {"bad": [(0.0, math.nan), (1.0, math.inf), (2.0, 1.0)]},
    ],
    ids=["nothing", "empty", "two", "point", "long", "not finite"],
)
def test_lines_give_a_png(tmp_path, lines):
    path = tmp_path / "plot.png"
    plot_lines(path, "title", "x", "y", lines)
    drawn = pixels(path)
    plot_lines(path, "title", "x", "y", {})
    if any(len(points) > 0 for points in lines.values()):
        assert drawn != pixels(path)


def test_every_line_is_drawn(tmp_path):
    plots = set()
    for names in (["one"], ["two"], ["one", "two"]):
        plot_lines(tmp_path / "plot.png", "title", "x", "y", {name: POINTS[name] for name in names})
        plots.add(pixels(tmp_path / "plot.png"))
    assert len(plots) == 3


@pytest.mark.parametrize("limit", [None, ("limit", 9.0)])
@pytest.mark.parametrize("count", [1, 3])
def test_stacked_bars_give_a_png(tmp_path, count, limit):
    bars = {f"model {i}": {"parameters": 1.0 + i, "gradients": 0.0, "state": 2.0} for i in range(count)}
    plot_stacked(tmp_path / "plot.png", "title", "GB", bars, limit)
    with_limit = pixels(tmp_path / "plot.png")
    plot_stacked(tmp_path / "other.png", "title", "GB", bars, ("limit", 5.0))
    assert with_limit != pixels(tmp_path / "other.png")


def test_a_loss_curve_leaves_out_what_was_not_measured(tmp_path):
    metrics = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": None},
        {"step": 3, "train/loss": 2.0},
        {"step": 3, "valid/loss": 2.5},
    ]
    plots = []
    for lines in (
        metrics,
        [line for line in metrics if line.get("train/loss", 0) is not None],
        metrics[:3],
        [],
    ):
        plot_loss_curve(tmp_path / "loss.png", lines, "title")
        plots.append(pixels(tmp_path / "loss.png"))
    assert plots[0] == plots[1]
    assert len(set(plots)) == 3


def test_plots_are_closed(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot_lines(tmp_path / "plot.png", "title", "x", "y", POINTS)
    plot_stacked(tmp_path / "plot.png", "title", "y", {"one": {"part": 1.0}})
    assert pyplot.get_fignums() == before
