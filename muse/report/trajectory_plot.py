"""Picture of the energy of tokens along the flows of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from muse.report.plots import new_axes, new_figure, save

# Flows that are drawn of a model with more.
MOST_PANELS = 12
COLUMNS = 4
# Kicks and drifts that have room for their names.
MOST_NAMES = 8


def plot_trajectories(
    path: Path,
    energies: Mapping[str, np.ndarray],
    halves: Sequence[str],
    dt: float,
    limit: tuple[str, float],
    title: str,
) -> None:
    """Write a panel for each flow, or for some evenly chosen ones: how far each token is from its energy.

    The axis is logarithmic, so that the start is not on it. Marks are where a step is done.

    Args:
        path: of the PNG.
        energies: by the name of a flow (1 + steps len(halves), tokens), the first at the start.
        halves: names of what a step is made of.
        dt: size of a step.
        limit: a name and the relative change that is dashed.
        title: of the picture.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    names = _evenly(list(energies), MOST_PANELS)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure((max(8, 1.2 + 3.2 * columns), 1.5 + 2.5 * rows))
    left_out = f", {len(names)} of {len(energies)} flows" if len(names) < len(energies) else ""
    figure.suptitle(f"{title}{left_out}")
    grid = figure.add_gridspec(rows, columns)
    all_axes: list[Any] = []
    lines = None
    for place, name in enumerate(names):
        start = energies[name][0]
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(energies[name] - start) / np.abs(start)
        # A logarithm of 0 would break the line where it is.
        change[change == 0] = np.nan
        tokens = np.arange(1, change.shape[1] + 1)
        steps = len(change) // len(halves)
        axes = new_axes(
            figure,
            f"{steps} step{'s' * (steps > 1)} of dt = {dt:g}" if place >= len(names) - columns else "",
            r"$|E - E_0|\;/\;|E_0|$" if place % columns == 0 else "",
            grid[place // columns, place % columns],
            sharey=all_axes[0] if all_axes else None,
        )
        axes.set_title(f"{name}: $E_0$ {start.min():.3g} to {start.max():.3g}", fontsize="small")
        done = np.arange(len(change)) / len(halves)
        lines = LineCollection(
            [np.column_stack((done, token)) for token in change.T], cmap="viridis", linewidths=0.8, alpha=0.7
        )
        lines.set_array(tokens)
        lines.set_clim(1, max(2, len(tokens)))
        axes.add_collection(lines)
        whole = change[:: len(halves)]
        axes.scatter(
            np.repeat(done[:: len(halves)], len(tokens)),
            whole.ravel(),
            c=np.tile(tokens, len(whole)),
            cmap="viridis",
            norm=lines.norm,
            s=9,
            zorder=3,
        )
        axes.axhline(limit[1], linestyle="--", color="black", linewidth=1)
        axes.set_yscale("log")
        axes.margins(x=0.1)
        _label_steps(axes, halves, len(done))
        if place % columns:
            axes.tick_params(labelleft=False)
        all_axes.append(axes)
    figure.colorbar(lines, ax=all_axes, label="generated token", ticks=MaxNLocator(integer=True))
    figure.supxlabel(f"points: whole steps; dashed: {limit[0]}", fontsize="small")
    save(figure, path)


def _evenly(names: list[str], most: int) -> list[str]:
    """At most so many of the names, the first and the last among them."""
    if len(names) <= most:
        return names
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


def _label_steps(axes: Any, halves: Sequence[str], points: int) -> None:
    """Name each kick and drift below the axis, or number the steps where there are many."""
    if points - 1 <= MOST_NAMES:
        named = (points - 1) // len(halves) * list(halves)
        axes.set_xticks([point / len(halves) for point in range(1, points)], named, fontsize="small")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
