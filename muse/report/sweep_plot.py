"""The picture of a multirun: what was measured over the options that differ, or over a search's trials."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from muse.report.plots import (
    COLOURS,
    MARKERS,
    ROOM,
    add_legend,
    add_line,
    label_bars,
    label_ends,
    new_axes,
    new_figure,
    new_panels,
)
from muse.report.table import show

Cells = Sequence[Mapping[str, Any]]

# Its values repeat a measurement; the mean over them is drawn.
REPEATED = "seed"
# What a search minimises.
OBJECTIVE = "valid_loss"


@dataclass(frozen=True)
class Metric:
    """What a sweep plots.

    Attributes:
        key: of the value in a cell.
        label: of its axis.
        name: of the value among those beside it.
        beside: keys of other values of a cell, and their names.
        reference: the one beside it that the others are divided by in a panel of their own.
        counted: whether it is an amount, which begins at zero.
        key_of_flow: of the same value in a cell of stages 2 and 3, beside cells of other stages.
    """

    key: str
    label: str
    name: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    counted: bool = True
    key_of_flow: str = ""


TRAINING = Metric(OBJECTIVE, "validation loss [nats per token]", counted=False)
# From here on lines, or bars beside each other, are too many to be told apart.
MOST_LINES = 8
# Bars that have room for their numbers.
MOST_NUMBERS = 24
# Characters that have room below an axis as wide as the figure, and below one of several.
WIDE, NARROW = 60, 24
# Numbers that are this far apart are shown on a logarithmic axis.
DECADES = 50
PANELS_A_ROW = 3
# A line that no option tells apart from those beside it.
OWN = "this model"
# A line that the others are divided by, where it is there.
BASELINE = "stage=0"
# Room beside the values, as a share of the largest, that keeps tiny differences from looking large.
SMALLEST_ROOM = 0.002


@dataclass(frozen=True)
class Scale:
    """Where the values of an option stand on an axis: numbers where they are, names one after the other."""

    option: str
    places: Mapping[str, float]
    numeric: bool
    log: bool


def scale_of(option: str, cells: Cells, log: bool | None = None) -> Scale:
    """The axis of an option: of numbers where all its values are, logarithmic if ``log``.

    By default it is logarithmic where the middle one of the values is nearer to their geometric mean. A group
    and the seed, whose names have no dot, are names even where they look like numbers.
    """
    texts = list(dict.fromkeys(_value(cell, option) for cell in cells))
    numbers = [_number(text) for text in texts] if "." in option else []
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(texts):
        return Scale(option, {text: float(place) for place, text in enumerate(texts)}, False, False)
    low, high, middle = min(known), max(known), median(known)
    geometric = low > 0 and abs(middle - math.sqrt(low * high)) < abs(middle - (low + high) / 2)
    wanted = geometric if log is None else log and low > 0
    places = dict(sorted(zip(texts, known, strict=True), key=lambda pair: pair[1]))
    return Scale(option, places, True, wanted)


def draw_sweep(cells: Cells, swept: Sequence[str], metrics: Sequence[Metric] = ()) -> Any:
    """What the cells measured over the options that differ between them.

    That is the loss of trainings, else the first of the metrics that was measured.

    Numbers are on the horizontal axis, with a line for each combination of the other options. Where there
    are none, names are on the vertical axis, with a bar or a point for each combination. Where these are too
    many to be told apart, each option has a panel. Cells that differ in their seed alone are drawn as their
    mean, and a dot each.

    Returns:
        The figure; None where nothing that can be drawn was measured.
    """
    measured = (one for one in (TRAINING, *metrics) if any(_key(cell, one) == one.key for cell in cells))
    metric = next(measured, None)
    if metric is None:
        return None
    options = [option for option in swept if option != REPEATED] or list(swept)
    # Numbers first, since lines say most; else the most varied, as they come.
    scales = sorted((scale_of(option, cells) for option in options), key=lambda scale: not scale.numeric)
    across, others = scales[0], [scale.option for scale in scales[1:]]
    title = f"{metric.label.split(' [')[0]} over {', '.join(scale.option for scale in scales)}"
    combinations = {_combination(cell, others) for cell in cells}
    if len(combinations) > MOST_LINES:
        found = [(cell, cell[key]) for cell in cells if (key := _key(cell, metric))]
        return _draw_options(textwrap.fill(title, 90), metric.label, scales, found)
    if options != list(swept):
        title += ", mean over the seeds"
    lines = _lines(cells, metric, across, others, beside="stage" not in options)
    if len(lines) > MOST_LINES:
        lines = _lines(cells, metric, across, others, beside=False)
    if across.numeric:
        return _draw_numbers(title, metric, across, lines)
    return _draw_names(title, metric, across, lines)


def draw_search(cells: Cells, searched: Mapping[str, bool]) -> Any:
    """The objective over the trials of a search with the best so far, and over each option searched.

    Args:
        cells: one for each trial, in their order.
        searched: options, and whether each was searched on a logarithmic scale.

    Returns:
        The figure; None as long as no trial has ended.
    """
    found = [(number, cell[OBJECTIVE]) for number, cell in enumerate(cells) if _known(cell, OBJECTIVE)]
    if not found:
        return None
    failed = [number for number, cell in enumerate(cells) if cell.get("status") == "failed"]
    best, lowest = min(found, key=lambda trial: trial[1])
    varied = [option for option in searched if any(option in cell["options"] for cell in cells)]
    chosen = ", ".join(f"{option}={_shown(_value(cells[best], option))}" for option in varied)
    title = f"search: the best of {len(cells)} trials is number {best}, with {show(lowest)} at {chosen}"
    figure, rows = _panels(textwrap.fill(title, 90), len(varied), 1)
    label = "validation loss\n[nats per token]"
    axes = new_axes(figure, "trial", label, rows[0, :])
    axes.xaxis.get_major_locator().set_params(integer=True)
    if min(value for _, value in found) > 0 and _decades([value for _, value in found]):
        axes.set_yscale("log")
    so_far = [(n, min(value for number, value in found if number <= n)) for n, _ in found]
    so_far.append((len(cells) - 1, lowest))
    axes.step(*zip(*so_far, strict=True), where="post", color=COLOURS[1], label="best so far")
    _add_trials(axes, found, failed, (best, lowest))
    for place, option in zip(_places(rows, 1), varied, strict=False):
        scale = scale_of(option, cells, searched[option])
        panel = new_axes(figure, option, "" if place[1] else label, rows[place], sharey=axes)
        _set_scale(panel, scale, NARROW)
        at = [scale.places[_value(cell, option)] for cell in cells]
        points = [(at[number], value) for number, value in found]
        _add_trials(panel, points, [at[number] for number in failed], (at[best], lowest))
    add_legend(figure, axes)
    return figure


def _add_trials(
    axes: Any,
    found: Sequence[tuple[float, float]],
    failed: Sequence[float],
    best: tuple[float, float],
) -> None:
    axes.plot(*zip(*found, strict=True), "o", markersize=4, color=COLOURS[0], label="trial")
    axes.plot(*best, "*", markersize=12, color=COLOURS[1], label="best trial")
    if failed:
        # They have no objective; they stand at the upper edge.
        axes.plot(
            failed,
            [1.0] * len(failed),
            "x",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            color=COLOURS[6],
            label="failed trial",
        )


def _draw_options(
    title: str, label: str, scales: Sequence[Scale], found: Sequence[tuple[Mapping[str, Any], float]]
) -> Any:
    """A panel for each option with a point for each cell, and the mean at each value."""
    figure, rows = _panels(title, len(scales), 0)
    first = None
    for place, scale in zip(_places(rows, 0), scales, strict=False):
        axes = new_axes(figure, scale.option, "" if place[1] else label, rows[place], sharey=first)
        first = first or axes
        _set_scale(axes, scale, NARROW)
        points = [(scale.places[_value(cell, scale.option)], value) for cell, value in found]
        axes.plot(*zip(*points, strict=True), ".", color=COLOURS[0], label="cell")
        means = _means(points)
        axes.plot(*zip(*means, strict=True), "_", markersize=18, color=COLOURS[1], label="mean")
    add_legend(figure, first)
    return figure


def _draw_numbers(
    title: str, metric: Metric, across: Scale, lines: Mapping[str, list[tuple[float, float]]]
) -> Any:
    """Lines over numbers; below, each over the reference, where there is one."""
    means = {name: _means(points) for name, points in lines.items()}
    reference = next((name for name in (metric.reference, BASELINE) if name in means), None)
    second = f"ratio to {reference}" if reference and metric.counted and len(means) > 1 else None
    figure, axes, below = new_panels(title, across.option, metric.label, second)
    _set_scale(axes, across, WIDE)
    values = [value for points in lines.values() for _, value in points]
    if min(values) > 0 and _decades(values):
        axes.set_yscale("log")
    else:
        _set_limits(axes.set_ylim, metric, values)
        axes.ticklabel_format(axis="y", useOffset=False)
    drawn = [add_line(axes, name, points, number) for number, (name, points) in enumerate(means.items())]
    _add_cells(axes, lines, means)
    label_ends(axes, drawn)
    if reference is not None and below is not None:
        whole = dict(means[reference])
        shares = []
        for number, (name, points) in enumerate(means.items()):
            parts = [(place, mean / whole[place]) for place, mean in points if whole.get(place)]
            if parts and name != reference:
                shares.append(add_line(below, name, parts, number))
        below.set_ylim(0, ROOM * max((share for line in shares for share in line.get_ydata()), default=1.0))
        label_ends(below, shares)
    return figure


def _add_cells(
    axes: Any, lines: Mapping[str, list[tuple[float, float]]], means: Mapping[str, list[tuple[float, float]]]
) -> None:
    """The single cells of every line whose points are means."""
    for number, (name, points) in enumerate(lines.items()):
        if len(points) > len(means[name]):
            axes.plot(*zip(*points, strict=True), ".", color=COLOURS[number % len(COLOURS)])


def _draw_names(
    title: str, metric: Metric, across: Scale, lines: Mapping[str, list[tuple[float, float]]]
) -> Any:
    """A bar, or a point, for each line at each name."""
    height = 0.8 / len(lines)
    figure = new_figure((8, 1.8 + 0.25 * len(across.places) * (len(lines) + 0.6)))
    axes = new_axes(figure, metric.label, across.option, title=title)
    repeated = any(len(points) > len(_means(points)) for points in lines.values())
    few = len(across.places) * len(lines) <= MOST_NUMBERS
    for number, (name, points) in enumerate(lines.items()):
        shift = (number - (len(lines) - 1) / 2) * height
        color, label = COLOURS[number % len(COLOURS)], name if len(lines) > 1 else "mean"
        places, means = zip(*((place + shift, mean) for place, mean in _means(points)), strict=True)
        if metric.counted:
            drawn = axes.barh(places, means, 0.9 * height, color=color, label=label)
            if few:
                label_bars(axes, drawn, means)
        else:
            axes.plot(means, places, MARKERS[number % len(MARKERS)], color=color, label=label)
            for place, mean in zip(places, means, strict=True) if few else ():
                axes.annotate(
                    show(mean),
                    (mean, place),
                    xytext=(0, 5),
                    textcoords="offset points",
                    horizontalalignment="center",
                    fontsize="small",
                )
        if len(points) > len(means):
            axes.plot(
                [value for _, value in points],
                [place + shift for place, _ in points],
                ".",
                color="black",
                label="" if number else "each seed",
            )
    _set_limits(axes.set_xlim, metric, [value for points in lines.values() for _, value in points])
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_yticks(list(across.places.values()), [textwrap.fill(text, 40) for text in across.places])
    axes.set_ylim(len(across.places) - 0.5, -0.5)
    if len(lines) > 1 or repeated:
        add_legend(figure, axes)
    return figure


def _set_limits(set_limits: Callable[[float, float], Any], metric: Metric, values: Sequence[float]) -> None:
    """Begin amounts at zero, and others where no tiny difference looks large."""
    low, high = min(values), max(values)
    if metric.counted:
        set_limits(min(low, 0.0), ROOM * high or 1.0)
    else:
        room = max(0.12 * (high - low), SMALLEST_ROOM * abs(high))
        set_limits(low - room, high + room)


def _panels(title: str, count: int, above: int) -> tuple[Any, Any]:
    """A figure, and its grid: ``above`` rows, and below them places for ``count`` panels."""
    below = math.ceil(count / PANELS_A_ROW)
    rows, columns = above + below, math.ceil(count / below) if below else 1
    figure = new_figure((max(7, 3.2 * columns), 0.8 + 2.6 * rows))
    figure.suptitle(title)
    return figure, figure.add_gridspec(rows, columns)


def _places(grid: Any, above: int) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(above, grid.nrows) for column in range(grid.ncols))


def _set_scale(axes: Any, scale: Scale, room: int) -> None:
    """The horizontal axis of an option, with names as ticks, and numbers that fit into so many characters."""
    if scale.log:
        axes.set_xscale("log")
    fits = sum(map(len, scale.places)) <= room
    if not scale.numeric:
        axes.set_xlim(-0.5, len(scale.places) - 0.5)
        if not fits:
            axes.tick_params(axis="x", rotation=90)
    if fits or not scale.numeric:
        axes.set_xticks(list(scale.places.values()), list(scale.places))
        axes.minorticks_off()


def _lines(
    cells: Cells, metric: Metric, across: Scale, others: Sequence[str], beside: bool
) -> dict[str, list[tuple[float, float]]]:
    """Points of each line by its name; what stands beside the metric is one line if all are the same."""
    lines: dict[str, list[tuple[float, float]]] = {}
    around: dict[str, dict[str, list[tuple[float, float]]]] = {}
    named = beside and any(_known(cell, key) for cell in cells for key in metric.beside)
    for cell in cells:
        place, combination = across.places[_value(cell, across.option)], _combination(cell, others)
        if key := _key(cell, metric):
            name = f"{metric.name if named else ''} {combination}".strip() or OWN
            lines.setdefault(name, []).append((place, cell[key]))
        for key, name in metric.beside.items() if beside else ():
            if _known(cell, key):
                around.setdefault(name, {}).setdefault(combination, []).append((place, cell[key]))
    for name, by_combination in around.items():
        different = {tuple(_means(points)) for points in by_combination.values()}
        for combination, points in by_combination.items():
            lines[f"{name} {combination}".strip() if len(different) > 1 else name] = points
    return {name: sorted(points) for name, points in lines.items()}


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [
        (place, fmean(value for at, value in points if at == place))
        for place in sorted({place for place, _ in points})
    ]


def _key(cell: Mapping[str, Any], metric: Metric) -> str | None:
    # A cell of stage 3 may have both, and only that of the flow is what the others measured.
    return next((key for key in (metric.key_of_flow, metric.key) if _known(cell, key)), None)


def _known(cell: Mapping[str, Any], key: str) -> bool:
    value = cell.get(key)
    return value is not None and math.isfinite(value)


def _value(cell: Mapping[str, Any], option: str) -> str:
    return str(cell["options"].get(option))


def _combination(cell: Mapping[str, Any], options: Sequence[str]) -> str:
    return ", ".join(f"{option.rsplit('.')[-1]}={_value(cell, option)}" for option in options)


def _decades(values: Sequence[float]) -> bool:
    return max(values) >= DECADES * min(values)


def _shown(text: str) -> str:
    number = _number(text)
    return text if number is None else show(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
