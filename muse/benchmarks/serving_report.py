"""What ``benchmark=serving`` found, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muse.benchmarks.benchmark import Models
from muse.benchmarks.server_loads import STREAMED, WHOLE
from muse.report.plots import add_line, label_ends, new_axes, new_figure
from muse.report.table import table
from muse.report.wandb_tables import ResultTable, lines_table

CLIENT_COLUMNS = (
    "form", "clients", "questions", "errors", "wrong", "tokens_per_second", "ratio", "ratio_offline",
    "p50_ms", "p95_ms", "p99_ms", "server_cores", "generator_cores",
)  # fmt: skip
TOKEN_COLUMNS = (
    "clients", "first_p50_ms", "first_p95_ms", "first_p99_ms", "between_p50_ms", "between_p95_ms",
    "between_p99_ms",
)  # fmt: skip
RATE_COLUMNS = (
    "rate", "share", "questions", "errors", "wrong", "answers_per_second", "p50_ms", "p95_ms", "p99_ms",
    "late_p95_ms", "server_cores", "generator_cores",
)  # fmt: skip
# Those that are one row.
LOADS = ("offline", "infer", "sustained", "overload", "cache")


def text(models: Models) -> list[str]:
    """Tables for the terminal."""
    parts = []
    for name, found in models.items():
        single = {key: value for key, value in found.items() if not isinstance(value, list | dict)}
        parts.append(table((name, ""), [[key, value] for key, value in single.items()]))
        for key, columns in (
            ("clients", CLIENT_COLUMNS),
            ("clients", TOKEN_COLUMNS),
            ("rates", RATE_COLUMNS),
        ):
            rows = [row for row in found.get(key, ()) if columns[1] in row]
            if rows:
                parts.append(table(columns, [[row.get(column) for column in columns] for row in rows]))
        loads = [key for key in LOADS if key in found]
        keys = dict.fromkeys(key for load in loads for key in found[load])
        parts.append(table(("", *loads), [[key, *(found[load].get(key) for load in loads)] for key in keys]))
    return parts


def tables(models: Models) -> list[ResultTable]:
    """For W&B: figures of each load, and what is drawn."""
    made = []
    for found in models.values():
        if "clients" not in found:
            continue
        for key, columns in (("clients", (*CLIENT_COLUMNS, *TOKEN_COLUMNS[1:])), ("rates", RATE_COLUMNS)):
            rows = [[row.get(column) for column in columns] for row in found[key]]
            made.append(ResultTable(f"serving {key}", columns, rows))
        made += [lines_table(f"serving {name}", x, y, lines) for name, x, y, lines in panels(found)]
        rows = [[load, key, value] for load in LOADS for key, value in found[load].items()]
        made.append(ResultTable("serving loads", ("load", "figure", "value"), rows))
    return made


def panels(found: Mapping[str, Any]) -> list[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]:
    """What is drawn: name, axes and lines."""

    def over_clients(form: str, *keys: str) -> dict[str, list[tuple[float, float]]]:
        rows = [row for row in found["clients"] if row["form"] == form]
        return {key.replace("_", " "): [(row["clients"], row[f"{key}_ms"]) for row in rows] for key in keys}

    def over_time(samples: str, **keys: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(sample["seconds"], sample[key]) for sample in found[samples]]
            for name, key in keys.items()
        }

    requests = {"running": "running", "waiting": "waiting"}

    throughput = {
        form: [(row["clients"], row["tokens_per_second"]) for row in found["clients"] if row["form"] == form]
        for form in (WHOLE, STREAMED)
    }
    ends = [throughput[WHOLE][0][0], throughput[WHOLE][-1][0]]
    throughput["without a server"] = [(x, found["offline"]["tokens_per_second"]) for x in ends]
    keys = ("p50", "p95", "p99")
    rates = {key: [(row["rate"], row[f"{key}_ms"]) for row in found["rates"]] for key in keys}
    tokens = over_clients(STREAMED, "first_p50", "first_p95", "between_p50", "between_p95")
    return [
        ("throughput", "clients", "tokens a second", throughput),
        ("whole requests", "clients", "whole request [ms]", over_clients(WHOLE, *keys)),
        ("tokens", "clients", "first token, between tokens [ms]", tokens),
        ("latency", "questions a second, open loop", "whole request [ms]", rates),
        ("memory", "seconds, sustained", "memory [MB]", over_time("samples", server="memory_mb")),
        ("processors", "seconds, sustained", "processors", over_time("samples", server="cores")),
        ("queue", "seconds, sustained", "requests", over_time("samples", **requests)),
        (
            "overload",
            "seconds, twice the capacity",
            "requests",
            over_time("overload_samples", **requests),
        ),
    ]


def plot(models: Models) -> Any:
    """Throughput and percentiles over clients and rates, and the server over time; of one model."""
    found = next((own for own in models.values() if "clients" in own), None)
    if found is None:
        return None
    figure = new_figure((11, 14))
    grid = figure.add_gridspec(4, 2)
    for number, (name, x, y, lines) in enumerate(panels(found)):
        axes = new_axes(figure, x, y, grid[number // 2, number % 2])
        drawn = [add_line(axes, line, points, index) for index, (line, points) in enumerate(lines.items())]
        if name in ("whole requests", "tokens", "latency"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if name == "latency" and found["knee"] is not None:
            axes.axvline(found["knee"], linestyle="--", color="black", linewidth=1)
            axes.set_title(f"knee at {found['knee']:.3g} questions a second", fontsize="medium")
        label_ends(axes, drawn)
    return figure
