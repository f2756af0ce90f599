"""The summary of a multirun: each cell has a file of its own, and whoever ends a cell reads them all."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muse.files import read_json, write_atomically, write_json
from muse.report.plots import save
from muse.report.sweep_plot import Metric, draw_search, draw_sweep
from muse.report.table import table

SUMMARY = "summary.json"
CELLS = "cells"
# Of a search alone.
SEARCH = "search.json"
# Of benchmarks alone.
METRICS = "drawn.json"
# What a cell is called until it ends; one that is killed keeps the name.
UNFINISHED = "unfinished"
INCOMPLETE = ("failed", "interrupted", UNFINISHED)


def record_cell(
    sweep: Path, number: int, overrides: list[str], values: dict[str, Any], status: str
) -> list[dict[str, Any]]:
    """Write what is known of a cell into the folder ``sweep``, then the summary of all cells.

    Args:
        sweep: folder of the multirun.
        number: of the cell in the multirun; what was recorded of it before is replaced.
        overrides: ``key=value`` arguments of the cell.
        values: what the cell measured, or its error.
        status: ``trained``, ``measured``, ``reused``, ``failed``, ``interrupted`` or ``unfinished``.

    Returns:
        All cells so far.
    """
    pairs = (override.split("=", 1) for override in overrides if "=" in override)
    options = {name: value.strip("'\"") for name, value in pairs}
    write_json(sweep / CELLS / f"{number:05}.json", {"options": options, "status": status, **values})
    return write_summary(sweep)


def record_search(sweep: Path, searched: dict[str, bool]) -> None:
    """Write into the folder ``sweep`` what a search varies, and whether each on a logarithmic scale."""
    write_json(sweep / SEARCH, searched)


def record_metrics(sweep: Path, metrics: Sequence[Metric]) -> None:
    """Write into the folder ``sweep`` the metrics of which the first that was measured is drawn."""
    write_json(sweep / METRICS, [asdict(metric) for metric in metrics])


def read_cells(sweep: Path) -> list[dict[str, Any]]:
    """The cells of a multirun by their number."""
    return [read_json(file) for file in sorted((sweep / CELLS).glob("*.json"))]


def write_summary(sweep: Path) -> list[dict[str, Any]]:
    """Write summary.json, summary.csv and summary.png from the files of all cells; return the cells.

    Any number of processes may do so at once: each reads the cells again after it has written, so the last
    one to write found nothing new, and no cell is lost, without a lock, which network file systems may lack.
    """
    written = None
    while (cells := read_cells(sweep)) != written:
        write_json(sweep / SUMMARY, cells)
        write_atomically(sweep / "summary.csv", _csv(cells))
        figure = draw_cells(sweep, cells)
        if figure is not None:
            save(figure, sweep / "summary.png")
        written = cells
    return cells


def show_cells(cells: list[dict[str, Any]]) -> str:
    """The cells as a table, and the errors of those that failed."""
    lines, errors = cell_table(cells)
    return "\n".join([table(lines[0], lines[1:]), *errors])


def cell_table(cells: list[dict[str, Any]]) -> tuple[list[list[Any]], list[str]]:
    """The lines of a table of the cells, the header first, and the errors of those that failed.

    What is too much for a line is a column for each cell; of two there is also the second over the first.
    """
    swept, cells = _labelled(cells)
    numbers = (key for cell in cells for key, value in cell.items() if isinstance(value, int | float))
    keys = list(dict.fromkeys(numbers))

    def name(cell: dict[str, Any]) -> str:
        return " ".join(str(cell["options"].get(option)) for option in swept)

    errors = [f"{name(cell)}: {cell['error']}" for cell in cells if cell.get("error")]
    lines: list[list[Any]] = [[" ".join(swept), "status", *keys]]
    lines += [[name(cell), cell["status"], *map(cell.get, keys)] for cell in cells]
    if len(keys) > MOST_COLUMNS:
        if len(cells) == 2:
            lines.append(["ratio", None, *(_factor(*(cell.get(key) for cell in cells)) for key in keys)])
        lines = [list(line) for line in zip(*lines, strict=True)]
    return lines, errors


def _factor(first: Any, second: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return second / first if numbers and first else None


def swept_options(cells: list[dict[str, Any]]) -> list[str]:
    """Options whose value differs between cells, the most varied first."""
    names = dict.fromkeys(name for cell in cells for name in cell["options"])
    variety = {name: len({cell["options"].get(name) for cell in cells}) for name in names}
    return sorted((name for name in names if variety[name] > 1), key=lambda name: -variety[name])


def _labelled(cells: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The options that differ and the cells; a single cell has none, so its number is made one."""
    if swept := swept_options(cells):
        return swept, cells
    return ["cell"], [{**cell, "options": {"cell": str(number)}} for number, cell in enumerate(cells)]


def _csv(cells: list[dict[str, Any]]) -> str:
    rows = [{**cell["options"], **{k: v for k, v in cell.items() if _scalar(v)}} for cell in cells]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# Numbers of a cell that fit a line.
MOST_COLUMNS = 12


def draw_cells(sweep: Path, cells: list[dict[str, Any]]) -> Any:
    """The figure of the cells of a multirun in the folder ``sweep``; None where nothing was measured."""
    if searched := read_json(sweep / SEARCH):
        return draw_search(cells, searched)
    swept, labelled = _labelled(cells)
    metrics = [Metric(**metric) for metric in read_json(sweep / METRICS)]
    return draw_sweep(labelled, swept, metrics)


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
