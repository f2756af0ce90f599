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
    """Write training and validation loss over the steps of a run."""
    lines = {
        name: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        for name, key in (("training", "train/loss"), ("validation", "valid/loss"))
    }
    plot_lines(path, title, "step", "loss [nats per token]", lines)
