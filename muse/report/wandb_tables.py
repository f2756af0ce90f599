"""What a benchmark found as tables and plots of W&B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muse.files import finite

HOLDERS = ("parameters", "optimiser", "activations", "gradients and temporaries")
# What is drawn of the models of a measurement.
COMPARED = {
    "vram": "peak",
    "throughput": "tokens_per_second",
    "perplexity": "ppl",
    "energy": "max_drift",
    "speedup": "seconds",
}
FIGURES = ("forward_ms_p50", "training_ms_p50", "forward_ratio", "training_ratio", "peak_ratio")


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


def result_tables(
    details: Mapping[str, Mapping[str, Any]],
    criteria: Sequence[Sequence[Any]],
    allowed_drift: float | None = None,
) -> list[ResultTable]:
    """Tables of a report's ``details`` and ``criteria`` (muse/benchmarks/report.py), empty ones left out.

    The drift of the energy that is allowed is a line of its own among those measured.
    """
    tables = [
        ResultTable("criteria", ("criterion", "measured", "target", "pass"), [list(row) for row in criteria])
    ]
    for measurement, models in details.items():
        if measurement == "kernels":
            tables.append(_kernels(models))
            continue
        tables.append(_models(measurement, models))
        curves = {name: values["curve"] for name, values in models.items() if "curve" in values}
        tables.append(_lines(f"{measurement} curve", "step", "loss", curves))
    tables.append(_memory(details.get("vram", {})))
    tables += _energies(details.get("energy", {}), allowed_drift)
    return [table for table in tables if table.rows]


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


def drift_lines(energies: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(time, drift) of every flow that ``energy`` followed, and of leapfrog; the start has no drift."""
    return {
        f"{name}, {scheme}": list(zip(values["times"][1:], values[key][1:], strict=True))
        for name, values in energies.items()
        for scheme, key in (
            (values["integrator"], "drift_trajectory"),
            ("leapfrog", "leapfrog_drift_trajectory"),
        )
    }


def _models(measurement: str, models: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    """A row for each model with everything that is one value."""
    keys = dict.fromkeys(
        key
        for values in models.values()
        for key, value in values.items()
        if not isinstance(value, list | dict)
    )
    rows = [[name, *(values.get(key) for key in keys)] for name, values in models.items()]
    drawn = COMPARED.get(measurement)
    return ResultTable(
        measurement, ("model", *keys), rows, bar=("model", drawn) if drawn and drawn in keys else None
    )


def _kernels(cases: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    """A row for each operation and alternative; one that is wrong or failed has none but its error."""

    def rows() -> Iterator[list[Any]]:
        for name, case in cases.items():
            for other, figures in case.get("alternatives", {"-": {}}).items():
                numbers = [figures.get(key) for key in FIGURES]
                yield [f"{name}, {other}", name, other, *numbers, case["error"] or figures.get("note")]

    columns = ("case", "operation", "alternative", *FIGURES, "remark")
    return ResultTable("kernels", columns, list(rows()), bar=("case", "training_ratio"))


def _lines(name: str, x: str, y: str, lines: Mapping[str, Sequence[Sequence[float]]]) -> ResultTable:
    rows = [[line, *point] for line, points in lines.items() for point in points]
    return ResultTable(name, ("line", x, y), rows, lines=(x, y, "line"))


def _memory(models: Mapping[str, Mapping[str, float]]) -> ResultTable:
    """What holds the memory of each model at its peak, in GB."""
    rows = [
        [f"{name}, {holder}", name, holder, values[holder]]
        for name, values in models.items()
        for holder in HOLDERS
        if holder in values
    ]
    return ResultTable("memory", ("part", "model", "holder", "GB"), rows, bar=("part", "GB"))


def _energies(energies: Mapping[str, Any], allowed_drift: float | None) -> list[ResultTable]:
    """Trajectories of the energy and of its drift, as a logarithm because W&B's plots have linear axes."""
    kept = {
        name: list(zip(values["times"], values["energy_trajectory"], strict=True))
        for name, values in energies.items()
    }
    drifts = {
        line: [(time, math.log10(drift)) for time, drift in points if drift]
        for line, points in drift_lines(energies).items()
    }
    times = [time for points in drifts.values() for time, _ in points]
    if allowed_drift is not None and times:
        drifts["allowed"] = [(time, math.log10(allowed_drift)) for time in (min(times), max(times))]
    return [
        _lines("energy trajectory", "time", "energy", kept),
        _lines("energy drift", "time", "log10 drift", drifts),
    ]
