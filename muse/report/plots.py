"""Pictures of runs and benchmarks: each is drawn as a figure, and saved as PNG.

Lines that may coincide differ in colour, marker and dashes, and are named where they end. What has a name
stands on the vertical axis, where there is room for it, and legends stand outside the axes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse.files import replacement
from muse.report.table import show

# (x, y); y may be missing.
Points = Sequence[tuple[float, float | None]]

# Okabe and Ito's colours, which the colour-blind tell apart, with grey in place of their yellow. There are
# fewer markers, so that no two of many lines share both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
# Lines of more points have no markers.
MOST_MARKERS = 30
# As wide as a legend may be; the sample beside a name is as wide as six.
LEGEND_CHARACTERS = 120
# Inches from one name to the next at the ends of lines, whose letters are small.
LABEL_GAP = 0.15
# Of an axis over the largest amount on it, beside which its number stands.
ROOM = 1.14


def _axes(title: str, x_label: str, y_label: str, size: tuple[float, float] = (8, 4.2)) -> tuple[Any, Any]:
    figure = new_figure(size)
    return figure, new_axes(figure, x_label, y_label, title=title)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of so many inches that makes room for what stands outside its axes."""
    # It reports the building of its font cache, which is of no use here.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # Not pyplot, which would keep every figure until it is closed, and look for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def new_axes(figure: Any, x_label: str, y_label: str, place: Any = 111, **options: Any) -> Any:
    """Axes at a place of the figure's grid, with the colours of every picture."""
    axes = figure.add_subplot(place, **options)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_prop_cycle(color=COLOURS)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def new_panels(title: str, x_label: str, y_label: str, second: str | None) -> tuple[Any, Any, Any]:
    """A figure, its axes, and below them, if ``second`` is a label, those of a smaller second panel."""
    if second is None:
        figure, axes = _axes(title, x_label, y_label)
        return figure, axes, None
    figure = new_figure((8, 6.4))
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    axes = new_axes(figure, "", y_label, grid[0], title=title)
    return figure, axes, new_axes(figure, x_label, second, grid[1], sharex=axes)


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG."""
    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def add_line(axes: Any, name: str, points: Points, number: int) -> Any:
    """Draw the ``number``-th line of a picture; return matplotlib's line."""
    (line,) = axes.plot(
        [x for x, _ in points],
        [math.nan if y is None else y for _, y in points],
        label=name,
        color=COLOURS[number % len(COLOURS)],
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)] if len(points) < MOST_MARKERS else None,
        markersize=6,
        # What is below shows through.
        markerfacecolor="none",
    )
    return line


def label_ends(axes: Any, lines: Sequence[Any]) -> None:
    """Write the name of each line beside its last point, in its colour, and no name upon another."""
    axes.autoscale_view()
    to_axes = axes.transScale + axes.transLimits
    ends = []
    # The first line, which is drawn first, is named above those that end where it does.
    for line in reversed(lines):
        known = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
        if known:
            ends.append((float(to_axes.transform(known[-1])[1]), line))
    ends.sort(key=lambda end: end[0])
    gap = LABEL_GAP / (axes.get_position().height * axes.figure.get_figheight())
    heights: list[float] = []
    for height, _ in ends:
        heights.append(max([height, *(below + gap for below in heights[-1:])]))
    above = 1 + gap
    for index in reversed(range(len(heights))):
        heights[index] = above = min(heights[index], above - gap)
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.annotate(
            line.get_label(),
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=line.get_color(),
            fontsize="small",
            annotation_clip=False,
        )


def label_bars(axes: Any, bars: Any, values: Sequence[float]) -> None:
    """Write their values beside the ends of horizontal bars, where a line may pass."""
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(
        bars, [show(float(value)) for value in values], padding=4, fontsize="small", bbox=background
    )


def add_legend(figure: Any, axes: Any) -> None:
    """Write the legend of the axes below everything else in the figure, each name once."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        # Bars before lines.
        shown = sorted(zip(handles, names, strict=True), key=lambda pair: hasattr(pair[0], "get_linestyle"))
        handles, names = zip(*shown, strict=True)
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=max(1, min(len(names), LEGEND_CHARACTERS // (max(map(len, names)) + 6))),
            fontsize="small",
        )


def draw_lines(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Points],
    log: bool = False,
    limit: tuple[str, float] | None = None,
    differences: tuple[str, Mapping[str, Points]] | None = None,
) -> Any:
    """One line for each name, over whole numbers or times.

    Args:
        title: of the figure.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        lines: (x, y) by name; a line without points is left out.
        log: whether y is logarithmic.
        limit: a name and the height of a dashed line.
        differences: the label of a second panel, below, and its lines, named as those above. It shows by how
            much lines differ that can hardly be told apart in the first one.

    Returns:
        The figure.
    """
    second = differences[0] if differences and differences[1] else None
    figure, axes, below = new_panels(title, x_label, y_label, second)
    if log:
        axes.set_yscale("log")
    drawn = _add_lines(axes, lines, list(lines))
    if limit is not None:
        axes.axhline(limit[1], linestyle="--", color="black", linewidth=1)
        axes.annotate(
            limit[0],
            (0.99, limit[1]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize="small",
        )
    label_ends(axes, drawn)
    if differences is not None and below is not None:
        below.axhline(0, color="black", linewidth=1)
        label_ends(below, _add_lines(below, differences[1], list(lines)))
    return figure


def _add_lines(axes: Any, lines: Mapping[str, Points], names: Sequence[str]) -> list[Any]:
    return [add_line(axes, name, points, names.index(name)) for name, points in lines.items() if points]


def subtracted(points: Points, reference: Points) -> list[tuple[float, float | None]]:
    """The points less those of the reference, where both are known."""
    known = {x: y for x, y in reference if y is not None}
    return [(x, y - known[x]) for x, y in points if y is not None and x in known]


def draw_stacked(
    title: str,
    x_label: str,
    bars: Mapping[str, Mapping[str, float]],
    limit: tuple[str, float] | None = None,
) -> Any:
    """A horizontal bar for each name, stacked from its parts, with the sum, and a dashed line at a limit."""
    figure, axes = _axes(title, x_label, "", (8, 1.8 + 0.45 * len(bars)))
    names = list(bars)
    ends = [0.0] * len(names)
    for part in next(iter(bars.values()), {}):
        widths = [parts[part] for parts in bars.values()]
        drawn = axes.barh(names, widths, left=ends, label=part, height=0.6)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if names:
        label_bars(axes, drawn, ends)
    if limit is not None:
        axes.axvline(limit[1], linestyle="--", color="black", label=f"{limit[0]}: {show(limit[1])}")
    axes.set_xlim(0, ROOM * max([*ends, limit[1] if limit else 0.0]) or 1.0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    add_legend(figure, axes)
    return figure


def draw_eigenvalues(title: str, operators: Mapping[str, Sequence[tuple[float, float]]]) -> Any:
    """Points (real part, imaginary part) of each operator in the complex plane, and the unit circle."""
    figure, axes = _axes(title, "real part", "imaginary part", (6.4, 6.8))
    angles = [2 * math.pi * step / 256 for step in range(257)]
    axes.plot([math.cos(x) for x in angles], [math.sin(x) for x in angles], color="black", linewidth=1)
    for number, (name, points) in enumerate(operators.items()):
        axes.plot(
            *zip(*points, strict=True),
            MARKERS[number % len(MARKERS)],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            markerfacecolor="none",
            markersize=5,
        )
    axes.set_aspect("equal")
    add_legend(figure, axes)
    return figure


def draw_intervals(title: str, x_label: str, rows: Mapping[str, tuple[float, Sequence[float] | None]]) -> Any:
    """A ratio and its interval, where there is one, in each row, and a line at 1."""
    figure, axes = _axes(title, x_label, "", (8, 1.6 + 0.32 * len(rows)))
    for position, (ratio, interval) in enumerate(rows.values()):
        low, high = interval or (ratio, ratio)
        axes.errorbar(
            ratio,
            position,
            xerr=([max(0, ratio - low)], [max(0, high - ratio)]),
            color=COLOURS[0],
            marker=MARKERS[0],
            markerfacecolor="none",
            capsize=3,
        )
        axes.annotate(
            f"{ratio:.3f}",
            (ratio, position),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color="black", linewidth=1)
    return figure


def draw_ratios(title: str, x_label: str, rows: Mapping[str, Mapping[str, float]]) -> Any:
    """A group of horizontal bars for each row, one for each of its ratios, on a logarithmic axis."""
    names = list(dict.fromkeys(name for ratios in rows.values() for name in ratios))
    bars = sum(map(len, rows.values()))
    figure, axes = _axes(title, x_label, "", (8, 2 + 0.13 * bars + 0.1 * len(rows)))
    position, ticks, seen = 0.0, [], set()
    for ratios in rows.values():
        ticks.append(position + (len(ratios) - 1) / 2)
        for name, ratio in ratios.items():
            color = COLOURS[names.index(name) % len(COLOURS)]
            label = None if name in seen else name
            axes.barh(position, ratio - 1, left=1, height=0.9, color=color, label=label)
            seen.add(name)
            position += 1
        position += 1
    axes.grid(visible=False, axis="y")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(ticks, list(rows))
    axes.set_ylim(position - 0.5, -1)
    axes.axvline(1, color="black", linewidth=1)
    add_legend(figure, axes)
    return figure
