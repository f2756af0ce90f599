"""What the benchmarks found, as the terminal, pictures, the log and W&B show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muse.benchmarks.results import Results
from muse.benchmarks.suite import BENCHMARKS
from muse.report.plots import save
from muse.report.sweep_plot import Metric
from muse.report.table import show, table
from muse.report.wandb_tables import ResultTable, model_tables

CRITERION = ("criterion", "measured", "target", "pass")
# The numbers that a sweep draws: the first of them that was measured.
METRICS: tuple[Metric, ...] = tuple(metric for benchmark in BENCHMARKS.values() for metric in benchmark.shown)


def text(results: Results) -> str:
    """Everything measured and the criteria, as tables for the terminal."""
    parts = []
    for measurement, models in results.details.items():
        benchmark = BENCHMARKS.get(measurement)
        parts += benchmark.text(models) if benchmark and benchmark.text else [_table(measurement, models)]
    if results.criteria:
        parts.append(table(CRITERION, results.criteria))
    parts += [f"{key} is open: {reason}" for key, reason in results.unjudged.items()]
    parts.append(f"all pass: {show(results.values['all_pass'])}")
    return "\n" + "\n\n".join(parts)


def _table(measurement: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """A column for each model."""
    values = next(iter(models.values()))
    keys = [k for k, v in values.items() if k != "device" and not isinstance(v, list | dict)]
    return table((measurement, *models), [[key, *(own.get(key) for own in models.values())] for key in keys])


def figures(results: Results) -> dict[str, Any]:
    """The figure of each benchmark that has one and was measured, by its name."""
    return {
        name: benchmark.plot(results.details[name])
        for name, benchmark in BENCHMARKS.items()
        if benchmark.plot is not None and results.details.get(name)
    }


def save_figures(results: Results) -> list[Path]:
    """Write the figures into the folder of the run, and return their paths."""
    paths = []
    for name, figure in figures(results).items():
        paths.append(results.folder / f"{name}.png")
        save(figure, paths[-1])
    return paths


def curves(results: Results) -> list[tuple[int, dict[str, float]]]:
    """Metrics of trainings by step, for the log."""
    return [
        line
        for name, benchmark in BENCHMARKS.items()
        if benchmark.curves is not None and name in results.details
        for line in benchmark.curves(results.details[name])
    ]


def tables(results: Results) -> list[ResultTable]:
    """Tables for W&B, empty ones left out."""
    found = [ResultTable("criteria", CRITERION, [list(row) for row in results.criteria])]
    for measurement, models in results.details.items():
        benchmark = BENCHMARKS.get(measurement)
        own = benchmark.tables if benchmark is not None else None
        found += model_tables(measurement, models) if own is None else own(models)
    return [one for one in found if one.rows]
