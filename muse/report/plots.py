"""Plots of runs and benchmarks, as PNG."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse.files import replacement


def _axes(title: str, x_label: str, y_label: str, size: tuple[float, float] = (7, 4.2)) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    # It reports the building of its font cache, which is of no use here.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with replacement(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def plot_lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    log: bool = False,
    log_x: bool = False,
    names: Sequence[str] | None = None,
    joined: bool = True,
) -> None:
    """Write one line, as (x, y) points, for each name; ``log`` makes y logarithmic, ``log_x`` x.

    ``names`` are shown at 0, 1, ... in place of numbers; ``joined=False`` leaves the points apart.
    """
    figure, axes = _axes(title, x_label, y_label)
    if log:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    if names is not None:
        axes.set_xticks(range(len(names)), names)
    for name, points in lines.items():
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=name,
                marker=marker if joined else "o",
                linestyle="-" if joined else "",
                markersize=4,
            )
    if any(lines.values()):
        axes.legend()
    _save(figure, path)


def plot_stacked(
    path: Path,
    title: str,
    y_label: str,
    bars: dict[str, dict[str, float]],
    limit: tuple[str, float] | None = None,
) -> None:
    """Write one bar for each name, stacked from its parts, and a dashed line at a limit."""
    figure, axes = _axes(title, "", y_label)
    parts = list(next(iter(bars.values()))) if bars else []
    below = [0.0] * len(bars)
    for part in parts:
        heights = [values[part] for values in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=part, width=0.6)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    if limit is not None:
        axes.axhline(limit[1], linestyle="--", color="black", label=limit[0])
    axes.legend()
    _save(figure, path)


def plot_ratios(path: Path, title: str, x_label: str, rows: dict[str, dict[str, float]]) -> None:
    """Write a group of horizontal bars for each row, one for each of its ratios, on a logarithmic axis."""
    names = list(dict.fromkeys(name for ratios in rows.values() for name in ratios))
    bars = sum(map(len, rows.values()))
    figure, axes = _axes(title, x_label, "", (8, 1.5 + 0.13 * bars + 0.1 * len(rows)))
    from matplotlib import pyplot

    position, ticks, seen = 0.0, [], set()
    for ratios in rows.values():
        ticks.append(position + (len(ratios) - 1) / 2)
        for name, ratio in ratios.items():
            color = pyplot.get_cmap("tab10")(names.index(name))
            label = None if name in seen else name
            axes.barh(position, ratio - 1, left=1, height=0.9, color=color, label=label)
            seen.add(name)
            position += 1
        position += 1
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(ticks, list(rows))
    axes.set_ylim(position - 0.5, -1)
    axes.axvline(1, color="black", linewidth=1)
    if seen:
        axes.legend()
    _save(figure, path)


def plot_loss_curve(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write training and validation loss over the steps of a run.

    The y-axis is for what comes after the first tenth of the steps, a little higher for where that begins; a
    remark tells the loss that the training began with. Validation losses are joined where they were measured
    on the same windows; that of the whole split has a mark of its own.
    """
    figure, axes = _axes(title, "step", "loss [nats per token]")
    training, last = _series(metrics, "train/loss"), _series(metrics, "train/last_loss")
    whole = _series(metrics, "valid/whole_loss")
    # Logged so often that a line holds one step only, the mean shows nothing else.
    if last and last != training:
        axes.plot(*zip(*last, strict=True), color="C0", alpha=0.3, linewidth=0.8, label="last batch")
    if training:
        axes.plot(
            *zip(*training, strict=True),
            color="C0",
            linewidth=1.8,
            label="training, mean since the last point",
        )
    measures: dict[tuple[Any, Any], list[tuple[float, float]]] = {}
    for line in metrics:
        if line.get("valid/loss") is not None:
            measure = line.get("valid/tokens"), line.get("valid/stride")
            measures.setdefault(measure, []).append((line["step"], line["valid/loss"]))
    for number, ((tokens, _), points) in enumerate(measures.items()):
        name = "validation" if tokens is None else f"validation, {tokens:,} tokens"
        marker = "os^D"[number % 4]
        axes.plot(
            *zip(*points, strict=True), color="C1", marker=marker, linestyle="--", linewidth=1, label=name
        )
    if whole:
        axes.plot(*zip(*whole, strict=True), "*", color="C3", markersize=12, label="validation, whole split")
        step, loss = whole[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), textcoords="offset points", ha="right", color="C3")
    lines = [training, last, *measures.values(), whole]
    _show_what_follows(axes, [point for points in lines for point in points])
    if axes.lines:
        axes.legend()
    _save(figure, path)


def _series(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has a finite value."""
    return [(line["step"], line[key]) for line in metrics if line.get(key) is not None]


def _show_what_follows(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Limit y to the points after the first tenth of x, if the first ones are far above all of them."""
    if not points:
        return
    end = max(x for x, _ in points)
    later = [y for x, y in points if x >= end / 10]
    lowest, highest, first = min(later), max(later), max(y for _, y in points)
    room = 0.15 * max(highest - lowest, 0.05)
    if first > highest + 2 * room:
        axes.set_ylim(lowest - room, highest + 2 * room)
        axes.annotate(
            f"from {first:.2f}",
            (0, 1),
            (6, -14),
            xycoords="axes fraction",
            textcoords="offset points",
            color="C0",
            fontsize=9,
            bbox={"color": "white", "pad": 1},
        )


def plot_flow(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write what ``muse.dynamics.watch`` measured of each flow over the steps of a run, if it did.

    Colours run from the first block to the last, flows of a block differ in line style.
    """
    keys = dict.fromkeys(key for line in metrics for key in line if key.count("/") == 2)
    names = list(dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("flow/")))
    if not names:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True)
    figure.suptitle(title)
    colours = pyplot.get_cmap("viridis")
    blocks = list(dict.fromkeys(name.rpartition("_")[0] for name in names))
    for axes, (key, label) in zip(panels.flat, FLOW_PANELS, strict=True):
        axes.set(title=label)
        axes.grid(alpha=0.3)
        ends = []
        for name in names:
            points = _series(metrics, f"flow/{name}/{key}")
            if not points:
                continue
            block, _, flow = name.rpartition("_")
            colour = colours(0.9 * blocks.index(block) / max(1, len(blocks) - 1))
            style = ("-", "--", ":", "-.")[int(flow) % 4] if flow.isdigit() else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", color=colour, linewidth=1.3)
            ends.append((*points[-1], name.removeprefix("blocks_").replace("_flow_", "."), colour))
        values = [y for line in axes.lines for y in line.get_ydata()]
        if values and min(values) > 0 and (key == "drift_max" or max(values) > 10 * min(values)):
            axes.set_yscale("log")
        if key == "fallen_back":
            axes.set(ylim=(-0.05, 1.05), yticks=(0, 1), yticklabels=("no", "yes"))
        _label_ends(axes, ends)
    for axes in panels[1]:
        axes.set_xlabel("step")
    _save(figure, path)


FLOW_PANELS = (
    ("energy", "mean energy at the start"),
    ("drift_max", "relative energy drift over a flow's own steps, worst token"),
    ("curvature_dt2", r"$\lambda_{\max}\, dt^2$, worst token"),
    ("fallen_back", "fallen back to checkpointing"),
)


def _label_ends(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Write the name of each line, (x, y, name, colour), beside its end, one above the other."""
    figure = axes.figure
    figure.draw_without_rendering()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    places = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in ends]
    # The height of a line of text.
    room = 8 * figure.dpi / 72 / axes.get_window_extent().height
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + room)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - room if i + 1 < len(places) else 1.0)
    for (_, _, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(name, (1.01, place), xycoords="axes fraction", color=colour, fontsize=7, va="center")
