"""The summary of a multirun: written again after every cell, so that a failed cell hides no other."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from muse.files import write_atomically, write_json
from muse.report.plots import plot_lines

SUMMARY = "summary.json"


def add_cell(sweep: Path, overrides: list[str], values: dict[str, Any], status: str) -> list[dict[str, Any]]:
    """Add a cell to the summary in the folder ``sweep``: summary.json, summary.csv, summary.png.

    Args:
        sweep: folder of the multirun.
        overrides: ``key=value`` arguments of the cell.
        values: what the cell measured, or its error.
        status: ``measured``, ``reused`` or ``failed``.

    Returns:
        All cells so far.
    """
    path = sweep / SUMMARY
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    options = dict(override.split("=", 1) for override in overrides if "=" in override)
    cells.append({"options": options, "status": status, **values})
    write_json(path, cells)
    rows = [{**cell["options"], **{k: v for k, v in cell.items() if _scalar(v)}} for cell in cells]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(sweep / "summary.csv", text.getvalue())
    _plot(sweep / "summary.png", cells)
    return cells


def swept_options(cells: list[dict[str, Any]]) -> list[str]:
    """Options whose value differs between cells, the most varied first."""
    names = dict.fromkeys(name for cell in cells for name in cell["options"])
    variety = {name: len({cell["options"].get(name) for cell in cells}) for name in names}
    return sorted((name for name in names if variety[name] > 1), key=lambda name: -variety[name])


# What a sweep plots: the first of these that was measured, and what stands beside it.
PLOTTED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("vram_gb", "peak memory [GB]", {"vram_baseline_gb": "stage 0"}),
    (
        "vram_symplectic_gb",
        "peak memory [GB]",
        {
            "vram_reversible_gb": "reversible",
            "vram_checkpoint_gb": "checkpoint",
            "vram_full_backprop_gb": "backprop",
        },
    ),
    ("tokens_per_second", "tokens per second", {}),
    ("ppl", "perplexity", {"ppl_baseline": "stage 0"}),
    ("stage2_ppl", "perplexity", {"stage1_ppl": "stage 1", "stage0_ppl": "stage 0"}),
    ("max_drift", "largest relative energy drift", {"max_drift_leapfrog": "leapfrog"}),
    ("grad_norm_max", "largest gradient norm", {}),
    ("nan_count", "NaN in the logits", {}),
)


def _plot(path: Path, cells: list[dict[str, Any]]) -> None:
    swept = swept_options(cells)
    measured = [plotted for plotted in PLOTTED if any(cell.get(plotted[0]) is not None for cell in cells)]
    if not swept or not measured:
        return
    name, (key, label, beside) = swept[0], measured[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    order = list(dict.fromkeys(cell["options"].get(name) for cell in cells))
    for cell in cells:
        others = ", ".join(f"{other}={cell['options'].get(other)}" for other in swept[1:])
        for other, line in {key: others or key, **{k: f"{v} {others}" for k, v in beside.items()}}.items():
            value = cell.get(other)
            if value is not None:
                lines.setdefault(line, []).append((_number(cell["options"].get(name), order), value))
    plot_lines(path, f"{label} over {name}", name, label, {k: sorted(v) for k, v in lines.items()})


def _number(value: Any, order: list[Any]) -> float:
    """A swept value as a coordinate: the number it is, or its place in the sweep."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float(order.index(value))


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
