"""Curves of runs over their steps, those of several runs in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muse.report.plots import (
    COLOURS,
    DASHES,
    MARKERS,
    MOST_MARKERS,
    draw_lines,
    label_ends,
    new_axes,
    new_figure,
)
from muse.report.run_plot import series, show_what_follows

Metrics = Sequence[dict[str, Any]]

# Metric, what its picture is called, and whether its axis is logarithmic.
CURVES = (
    ("train/lr", "learning rate", False),
    ("train/tokens_per_second", "training speed [tokens/s]", False),
    ("train/grad_norm", "gradient norm, mean since the last point", True),
    ("flow/energy", "mean energy of the flows at their start", False),
    ("flow/drift_max", "relative energy drift over the flows' own steps, worst token", True),
    ("flow/curvature_dt2", "largest curvature times dt², worst token", False),
    ("flow/reconstruction_error", "largest reconstruction error of a flow", True),
    ("flow/fallbacks", "fallbacks of flows to checkpointing so far", False),
    ("trunk/fallbacks", "fallbacks of the trunk to checkpointing so far", False),
)
# A line of more points is drawn with every so many of them.
MOST_POINTS = 1000
# A picture of more lines has no room for their names.
MOST_RUNS = 16


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evenly spaced points, the last one among them, of more than a picture can show."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return points[::-1][::stride][::-1] if points else []


def draw_losses(runs: Mapping[str, Metrics]) -> Any:
    """Training and validation loss of runs in one picture, a colour each.

    Training is a thin line, validation has markers, and that of the whole split a star; where there is no
    validation loss, the name of a run stands at the end of its training loss.

    Returns:
        The figure; None where no loss was logged.
    """
    figure = new_figure((8, max(4.2, 1.5 + 0.2 * len(runs))))
    axes = new_axes(figure, "step", "loss [nats per token]")
    named, points = [], []
    for number, (name, metrics) in enumerate(runs.items()):
        color, dashes = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        training, valid = thinned(series(metrics, "train/loss")), thinned(series(metrics, "valid/loss"))
        whole = series(metrics, "valid/whole_loss")
        ends = []
        if training:
            ends += axes.plot(*zip(*training, strict=True), dashes, color=color, alpha=0.45, linewidth=1)
        if valid:
            marker = MARKERS[number % len(MARKERS)] if len(valid) < MOST_MARKERS else ""
            ends += axes.plot(*zip(*valid, strict=True), dashes, marker=marker, markersize=4, color=color)
        if whole:
            axes.plot(*zip(*whole, strict=True), "*", color=color, markersize=11)
        if ends:
            ends[-1].set_label(name)
            named.append(ends[-1])
        points += [*training, *valid, *whole]
    if not named:
        return None
    show_what_follows(axes, points)
    label_ends(axes, named)
    return figure


def draw_curves(runs: Mapping[str, Metrics]) -> dict[str, Any]:
    """What else was logged over the steps, by what it is called; counts that stayed at zero are left out."""
    figures = {}
    for key, label, log in CURVES:
        lines = {name: thinned(series(metrics, key)) for name, metrics in runs.items()}
        values = [value for points in lines.values() for _, value in points]
        if values and not ("fallbacks" in key and not any(values)):
            # A single line needs no name; that of an empty one would be matplotlib's.
            shown = lines if len(runs) > 1 else {" ": next(iter(lines.values()))}
            figures[label] = draw_lines("", "step", "", shown, log=log and min(values) > 0)
    return figures


def fallbacks(metrics: Metrics) -> int | None:
    """Times that a run has taken gradients by checkpointing instead; None where it has nothing that could."""
    counts = [series(metrics, key) for key in ("flow/fallbacks", "trunk/fallbacks")]
    known = [points[-1][1] for points in counts if points]
    return int(sum(known)) if known else None
