"""The pictures of the README, drawn from figures that were measured before.

python -m muse.report.readme_pictures docs/figures docs/pictures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muse.commands import Parser, run_command
from muse.errors import ConfigError, RunError
from muse.files import replacement
from muse.report.plots import add_line, label_ends, new_axes, new_figure

# Inches; three stand side by side.
SIZE = (3.6, 2.6)
# What a file of figures holds. It says how they were measured, too, which no picture shows.
KEYS = ("x_label", "y_label", "log_y", "lines", "commands", "machine", "date", "commit", "versions")


def main() -> None:
    """The command."""
    parser = Parser("muse.report.readme_pictures", __doc__)
    parser.add_argument("figures", type=Path, help="folder of JSON files")
    parser.add_argument("pictures", type=Path, help="folder for an SVG of each")
    run_command(lambda: draw_pictures(**vars(parser.parse_args())))


def draw_pictures(figures: Path, pictures: Path) -> None:
    """Draw every file of figures in a folder into another folder, and say where.

    Raises:
        ConfigError: there are none, or one lacks something.
        RunError: a picture cannot be written.
    """
    files = sorted(figures.glob("*.json"))
    if not files:
        raise ConfigError(f"{figures} has no figures; give the folder docs/figures of MUSE")
    for file in files:
        path = pictures / f"{file.stem}.svg"
        figure = draw(read_figures(file))
        try:
            with replacement(path) as temporary:
                _save(figure, temporary)
        except OSError as error:
            raise RunError(f"{path} could not be written: {error.strerror or error}") from error
        print(f"the picture is {path}")


def read_figures(file: Path) -> dict[str, Any]:
    """What a file of figures holds.

    Raises:
        ConfigError: it cannot be read, or lacks one of ``KEYS``.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in KEYS if key not in told]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} has no figures ({error})") from error
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}")
    return dict(told)


def draw(told: dict[str, Any]) -> Any:
    """A line for each name, which stands at its end, and a dashed one at the limit, if there is one."""
    figure = new_figure(SIZE)
    axes = new_axes(figure, told["x_label"], told["y_label"])
    axes.spines[["top", "right"]].set_visible(False)
    if told["log_y"]:
        axes.set_yscale("log")
    drawn = [
        add_line(axes, name, points, number) for number, (name, points) in enumerate(told["lines"].items())
    ]
    ticks = told.get("ticks")
    if ticks is not None:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if not told["log_y"]:
        axes.set_ylim(told.get("lowest"), told.get("highest"))
    if limit := told.get("limit"):
        axes.axhline(limit["value"], linestyle="--", color="black", linewidth=1)
        axes.annotate(
            limit["name"],
            (0.02, limit["value"]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize="small",
        )
    label_ends(axes, drawn)
    return figure


def _save(figure: Any, path: Path) -> None:
    """As SVG on white, which can be read on any page; equal figures make equal files."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "muse"}):
        figure.canvas.print_figure(path, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
