"""Tables and plots of W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muse.files import finite


@dataclass(frozen=True)
class ResultTable:
    """Rows under columns, and how they are drawn.

    Attributes:
        name: of the table and its plot.
        columns: names of the columns.
        rows: one value a column.
        bar: columns of the labels and of the heights, for a bar plot.
        lines: columns of x, of y and of the name of the line, for a line plot.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    bar: tuple[str, str] | None = None
    lines: tuple[str, str, str] | None = None


def wandb_objects(tables: Sequence[ResultTable]) -> dict[str, Any]:
    """``tables/<name>``, and ``plots/<name>`` of those that are drawn, ready to be logged."""
    import wandb

    logged: dict[str, Any] = {}
    for table in tables:
        content = wandb.Table(columns=list(table.columns), data=finite(table.rows), allow_mixed_types=True)
        logged[f"tables/{table.name}"] = content
        if table.bar is not None:
            label, height = table.bar
            logged[f"plots/{table.name}"] = wandb.plot.bar(content, label, height, title=table.name)
        if table.lines is not None:
            x, y, line = table.lines
            logged[f"plots/{table.name}"] = wandb.plot.line(content, x, y, stroke=line, title=table.name)
    return logged


def model_tables(
    measurement: str, models: Mapping[str, Mapping[str, Any]], drawn: str = ""
) -> list[ResultTable]:
    """A row for each model with everything that is one value, and their losses where these are known.

    Args:
        measurement: names the tables.
        models: what was measured, by model.
        drawn: the value that the models are compared by in a plot.
    """
    keys = dict.fromkeys(
        key
        for values in models.values()
        for key, value in values.items()
        if not isinstance(value, list | dict)
    )
    rows = [[name, *(values.get(key) for key in keys)] for name, values in models.items()]
    bar = ("model", drawn) if drawn in keys else None
    curves = {name: values["curve"] for name, values in models.items() if "curve" in values}
    return [
        ResultTable(measurement, ("model", *keys), rows, bar=bar),
        lines_table(f"{measurement} curve", "step", "loss", curves),
    ]


def lines_table(name: str, x: str, y: str, lines: Mapping[str, Sequence[Sequence[float]]]) -> ResultTable:
    """The points of each line, which are drawn."""
    rows = [[line, *point] for line, points in lines.items() for point in points]
    return ResultTable(name, ("line", x, y), rows, lines=(x, y, "line"))
