"""Pictures of a training run: its losses, what its flows do, and how long its operators remember."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muse.report.plots import COLOURS, DASHES, add_line, label_ends, new_axes, new_figure, save

FLOW_PANELS = (
    ("energy", "mean energy at the start"),
    ("drift_max", "relative energy drift over a flow's own steps, worst token"),
    ("curvature_dt2", r"$\lambda_{\max}\, dt^2$, worst token"),
    ("fallen_back", "fallen back to checkpointing"),
)


def plot_loss_curve(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write the picture of ``draw_loss_curve``."""
    save(draw_loss_curve(metrics, title), path)


def draw_loss_curve(metrics: list[dict[str, Any]], title: str) -> Any:
    """Training and validation loss over the steps of a run.

    The y-axis is for what comes after the first tenth of the steps, a little higher for where that begins; a
    remark tells the loss that the training began with. Validation losses are joined where they were measured
    on the same windows; that of the whole split has a mark of its own.

    Returns:
        The figure.
    """
    figure = new_figure((8, 4.2))
    axes = new_axes(figure, "step", "loss [nats per token]", title=title)
    training, last = series(metrics, "train/loss"), series(metrics, "train/last_loss")
    whole = series(metrics, "valid/whole_loss")
    # Logged so often that a line holds one step only, the mean shows nothing else.
    if last and last != training:
        axes.plot(*zip(*last, strict=True), color=COLOURS[0], alpha=0.3, linewidth=0.8, label="last batch")
    if training:
        axes.plot(
            *zip(*training, strict=True),
            color=COLOURS[0],
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
        axes.plot(*zip(*points, strict=True), f"{marker}--", color=COLOURS[1], linewidth=1, label=name)
    if whole:
        axes.plot(
            *zip(*whole, strict=True), "*", color=COLOURS[2], markersize=12, label="validation, whole split"
        )
        step, loss = whole[-1]
        axes.annotate(
            f"{loss:.3f}", (step, loss), (0, 9), textcoords="offset points", ha="right", color=COLOURS[2]
        )
    lines = [training, last, *measures.values(), whole]
    show_what_follows(axes, [point for points in lines for point in points])
    if axes.lines:
        axes.legend()
    return figure


def series(metrics: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has a finite value."""
    return [(line["step"], line[key]) for line in metrics if line.get(key) is not None]


def show_what_follows(axes: Any, points: Sequence[tuple[float, float]]) -> None:
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
            color=COLOURS[0],
            fontsize=9,
            bbox={"color": "white", "pad": 1},
        )


def plot_flow(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write the picture of ``draw_flow``, if there is one."""
    figure = draw_flow(metrics, title)
    if figure is not None:
        save(figure, path)


def draw_flow(metrics: list[dict[str, Any]], title: str) -> Any:
    """What ``muse.dynamics.watch`` measured of each flow over the steps of a run.

    Colours run from the first block to the last, flows of a block differ in line style.

    Returns:
        The figure; None where it measured nothing.
    """
    keys = dict.fromkeys(key for line in metrics for key in line if key.count("/") == 2)
    names = list(dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("flow/")))
    if not names:
        return None
    from matplotlib import colormaps

    figure = new_figure((11, 7.5))
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2)
    blocks = list(dict.fromkeys(name.rpartition("_")[0] for name in names))
    for place, (key, label) in enumerate(FLOW_PANELS):
        axes = new_axes(figure, "step" if place > 1 else "", "", grid[place], title=label)
        for name in names:
            points = series(metrics, f"flow/{name}/{key}")
            if not points:
                continue
            block, _, flow = name.rpartition("_")
            axes.plot(
                *zip(*points, strict=True),
                DASHES[int(flow) % len(DASHES)] if flow.isdigit() else "-",
                marker=".",
                color=colormaps["viridis"](0.9 * blocks.index(block) / max(1, len(blocks) - 1)),
                linewidth=1.3,
                label=name.removeprefix("blocks_").replace("_flow_", "."),
            )
        values = [y for line in axes.lines for y in line.get_ydata()]
        if values and min(values) > 0 and (key == "drift_max" or max(values) > 10 * min(values)):
            axes.set_yscale("log")
        if key == "fallen_back":
            axes.set(ylim=(-0.05, 1.05), yticks=(0, 1), yticklabels=("no", "yes"))
        label_ends(axes, axes.lines)
    return figure


def plot_half_lives(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write the half-lives of the Koopman operators over the steps of a run, if there are any.

    The median of each with its name, and thin lines that 80 % of its observables are between.
    """
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith("koopman/"))
    names = list(dict.fromkeys(key.split("/")[1] for key in keys))
    if not names:
        return
    figure = new_figure((8, 4.2))
    axes = new_axes(figure, "step", "half-life [tokens]", title=title, yscale="log")
    medians = []
    for number, name in enumerate(names):
        low, middle, high = (
            series(metrics, f"koopman/{name}/half_life_p{percent}") for percent in (10, 50, 90)
        )
        block = name.removeprefix("blocks_").partition("_")[0]
        medians.append(add_line(axes, f"block {block}", middle, number))
        style = {"color": medians[-1].get_color(), "linestyle": medians[-1].get_linestyle()}
        for bound in (low, high):
            axes.plot(*zip(*bound, strict=True), linewidth=0.7, **style)
    label_ends(axes, medians)
    save(figure, path)


def plot_levels_read(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write what the MERA routers of a run read in its last evaluation, by level, if there are any.

    Of each a line with its name, and a thin one of the first evaluation.
    """
    told = [line for line in metrics if any(key.startswith("mera/") for key in line)]
    if not told:
        return
    figure = new_figure((8, 4.2))
    axes = new_axes(figure, "tokens a node", "mean weight", title=title)
    names = dict.fromkeys(key.split("/")[1] for line in told for key in line if key.startswith("mera/"))
    lasts = []
    for number, name in enumerate(names):
        first, last = (_read_by(line, f"mera/{name}/level_") for line in (told[0], told[-1]))
        block = name.removeprefix("blocks_").partition("_")[0]
        lasts.append(add_line(axes, f"block {block}", last, number))
        if len(told) > 1:
            style = {"color": lasts[-1].get_color(), "linestyle": lasts[-1].get_linestyle()}
            axes.plot(*zip(*first, strict=True), linewidth=0.7, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    label_ends(axes, lasts)
    save(figure, path)


def _read_by(line: dict[str, Any], prefix: str) -> list[tuple[float, float]]:
    """Tokens a node of each level, and its weight."""
    return [
        (2.0 ** int(key.removeprefix(prefix)), line[key])
        for key in line
        if key.startswith(prefix) and line[key] is not None
    ]


def plot_contradiction(path: Path, metrics: list[dict[str, Any]], title: str) -> None:
    """Write how far the synthesis is from the thesis over the steps of a run, if it has a dialectic loop."""
    points = series(metrics, "dialectic/contradiction")
    if not points:
        return
    figure = new_figure((8, 4.2))
    axes = new_axes(figure, "step", "contradiction [nats]", title=title)
    add_line(axes, "contradiction", points, 0)
    axes.set_ylim(bottom=0)
    save(figure, path)
