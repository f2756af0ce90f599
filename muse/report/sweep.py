"""The summary of a multirun: each cell has a file of its own, and whoever ends a cell reads them all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from muse.files import write_atomically, write_json
from muse.report.plots import plot_lines
from muse.report.table import table

SUMMARY = "summary.json"
CELLS = "cells"
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


def read_cells(sweep: Path) -> list[dict[str, Any]]:
    """The cells of a multirun by their number."""
    files = sorted((sweep / CELLS).glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def write_summary(sweep: Path) -> list[dict[str, Any]]:
    """Write summary.json, summary.csv and summary.png from the files of all cells; return the cells.

    Any number of processes may do so at once: each reads the cells again after it has written, so the last
    one to write found nothing new, and no cell is lost, without a lock, which network file systems may lack.
    """
    written = None
    while (cells := read_cells(sweep)) != written:
        write_json(sweep / SUMMARY, cells)
        write_atomically(sweep / "summary.csv", _csv(cells))
        _plot(sweep / "summary.png", cells)
        written = cells
    return cells


def show_cells(cells: list[dict[str, Any]]) -> str:
    """The cells as a table, and the errors of those that failed.

    What is too much for a line is a column for each cell; of two there is also the second over the first.
    """
    swept, cells = _told_apart(cells)
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
    return "\n".join([table(lines[0], lines[1:]), *errors])


def _factor(first: Any, second: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return second / first if numbers and first else None


def swept_options(cells: list[dict[str, Any]]) -> list[str]:
    """Options whose value differs between cells, the most varied first."""
    names = dict.fromkeys(name for cell in cells for name in cell["options"])
    variety = {name: len({cell["options"].get(name) for cell in cells}) for name in names}
    return sorted((name for name in names if variety[name] > 1), key=lambda name: -variety[name])


def _told_apart(cells: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
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
# What a sweep plots: the first of these that was measured, and what stands beside it.
PLOTTED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("valid_loss", "validation loss [nats per token]", {}),
    ("vram_gb", "peak memory [GB]", {"vram_baseline_gb": "stage 0"}),
    (
        "vram_symplectic_gb",
        "peak memory [GB]",
        {
            "vram_symplectic_gb": "exact",
            "vram_reversible_gb": "reversible",
            "vram_checkpoint_gb": "checkpoint",
            "vram_full_backprop_gb": "backprop",
        },
    ),
    ("tokens_per_second", "tokens per second", {}),
    ("ppl", "perplexity", {"ppl_baseline": "stage 0"}),
    ("stage2_ppl", "perplexity", {"stage1_ppl": "stage 1", "stage0_ppl": "stage 0"}),
    ("plain_seconds", "seconds of the training", {"stack_seconds": "with the stack"}),
    ("max_drift", "largest relative energy drift", {"max_drift_leapfrog": "leapfrog"}),
    ("grad_norm_max", "largest gradient norm", {}),
    ("nan_count", "NaN in the logits", {}),
)
# From here on the combinations of the other options are too many to be told apart by colour.
MOST_LINES = 12
# Numbers that are this far apart are shown on a logarithmic axis.
DECADES = 50


def _plot(path: Path, cells: list[dict[str, Any]]) -> None:
    swept, cells = _told_apart(cells)
    measured = [plotted for plotted in PLOTTED if any(cell.get(plotted[0]) is not None for cell in cells)]
    if not measured:
        return
    name, (key, label, beside) = swept[0], measured[0]
    values = list(dict.fromkeys(cell["options"].get(name) for cell in cells))
    numbers = [_number(value) for value in values]
    numeric = [number for number in numbers if number is not None]
    words = len(numeric) < len(numbers)
    place = dict(zip(values, range(len(values)) if words else numeric, strict=True))
    groups = {", ".join(f"{other}={cell['options'].get(other)}" for other in swept[1:]) for cell in cells}
    scattered = len(groups) > MOST_LINES
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        others = ", ".join(f"{other}={cell['options'].get(other)}" for other in swept[1:])
        if scattered:
            others = ""
        for other, line in {key: "", **beside}.items():
            value = cell.get(other)
            if value is not None:
                drawn = lines.setdefault(f"{line} {others}".strip() or key, [])
                drawn.append((place[cell["options"].get(name)], value))
    plot_lines(
        path,
        f"{label} over {name}",
        name,
        label,
        {k: sorted(v) for k, v in lines.items()},
        log_x=not words and min(numeric) > 0 and max(numeric) >= DECADES * min(numeric),
        names=[str(value) for value in values] if words else None,
        joined=not scattered,
    )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
