"""``benchmark=kernels``: what passes of the operations of kernels/, and what is shown of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.criteria import all_of
from muse.benchmarks.kernel_cases import FAMILIES, measure_kernels
from muse.benchmarks.results import Results
from muse.config import BenchConfig
from muse.report.plots import draw_ratios
from muse.report.sweep_plot import Metric
from muse.report.table import table
from muse.report.wandb_tables import ResultTable

# A kernel counts as slower from here on: two equal functions timed in turns differ by up to 5 %.
SPEED_TARGET = 0.95
# Alternatives that do what ours does, where plain code does less.
SAME_MATHS = ("fixed point", "rounded", "checkpoint")
FIGURES = ("forward_ms_p50", "training_ms_p50", "forward_ratio", "training_ratio", "peak_ratio")


def judge(config: BenchConfig, results: Results) -> None:
    """The families of operations, in a process each."""
    rows: dict[str, dict[str, Any]] = {}
    for family in config.benchmark.families:
        print(f"kernels: {family} ...", flush=True)
        measured = results.run(f"kernels {family}", config)
        if measured:
            rows |= {name: row | {"device": measured["device"]} for name, row in measured["cases"].items()}
        else:
            rows[family] = {
                "family": family, "correct": None, "error": results.failures[f"kernels {family}"],
            }  # fmt: skip
    results.details["kernels"] = rows
    correct = [row["correct"] for row in rows.values()]
    values = results.values
    values["kernels_correct"] = all_of(correct)
    for name, row in rows.items():
        for other in ("eager", "SDPA"):
            figures = row.get("alternatives", {}).get(other)
            if figures is not None:
                key = f"{name.replace(', ', ' ')} {other}_ratio".lower()
                values["_".join(key.replace("+", "").split())] = figures["training_ratio"]
    count = f"{sum(passed is True for passed in correct)} of {len(correct)}"
    results.criteria.append(("every operation is correct", count, "all", values["kernels_correct"]))
    _speed_criterion(results, rows, "eager", "kernels_worst", "no operation slower than plain eager")
    real = {
        name: row
        for name, row in rows.items()
        if row.get("operation", name) in ("attention", "attention real")
    }
    _speed_criterion(results, real, "SDPA", "kernels_sdpa", "real attention no slower than SDPA")


def _speed_criterion(
    results: Results, rows: dict[str, dict[str, Any]], other: str, key: str, title: str
) -> None:
    """The smallest ratio of the alternative's time to ours, forward or with backward, and whose it is.

    What is held against the same maths: a flow against plain code that adds whole numbers and subtracts them
    again, an update against one that rounds stochastically, too, and a loss against one that makes its logits
    again in the backward pass.
    """
    ratios = {}
    for name, row in rows.items():
        if alternatives := row.get("alternatives"):
            same = next(alternatives[one] for one in (*SAME_MATHS, other) if one in alternatives)
            ratios[f"{name}, forward"] = same["forward_ratio"]
            ratios[f"{name}, with backward"] = same["training_ratio"]
    worst = min(ratios, key=ratios.__getitem__, default=None)
    # What was not measured, because it is wrong or failed, is no pass.
    passed = all_of([row["correct"] for row in rows.values()])
    if worst is not None and ratios[worst] < SPEED_TARGET:
        passed = False
    results.values |= {
        f"{key}_ratio": None if worst is None else ratios[worst],
        f"{key}_case": worst,
    }
    where = f" ({worst})" if worst is not None else ""
    results.criteria.append((title + where, results.values[f"{key}_ratio"], f">= {SPEED_TARGET}", passed))


def plot(models: Models) -> Any:
    """The time of each alternative over ours."""
    ratios = {
        name: {
            other: figures["training_ratio"]
            for other, figures in row["alternatives"].items()
            if other != "ours" and "training_ratio" in figures
        }
        for name, row in models.items()
        if "alternatives" in row
    }
    label = "time of the alternative / ours, forward + backward (above 1: ours is faster)"
    return draw_ratios("operations of kernels/", label, ratios)


def text(models: Models) -> list[str]:
    """A table for each family, whose operations have much the same alternatives."""
    parts = [
        "alternatives: their time / ours, forward + backward (eager fwd: forward alone)\n"
        "memory: peak of eager / ours; peak fwd, bwd: share of the rate of a large product"
    ]
    for family in dict.fromkeys(row["family"] for row in models.values()):
        members = {name: row for name, row in models.items() if row["family"] == family}
        names = dict.fromkeys(name for row in members.values() for name in row.get("alternatives", {}))
        others = [name for name in names if name not in ("ours", "eager")]
        header = (family, "dtype", "fwd ms", "fwd+bwd", "eager fwd", "eager", *others, "memory")
        header += ("peak fwd", "bwd")
        parts.append(table(header, [_cells(row, others) for row in members.values()]))
        remarks = [f"{name}: {row['error']}" for name, row in members.items() if row["error"] is not None]
        remarks += [
            f"{name}: {figures['note']}"
            for name, row in members.items()
            for figures in row.get("alternatives", {}).values()
            if "note" in figures
        ]
        if remarks:
            parts.append("\n".join(remarks))
    return parts


def _cells(row: Mapping[str, Any], others: list[str]) -> list[object]:
    def of(name: str, key: str) -> object:
        return row.get("alternatives", {}).get(name, {}).get(key)

    def short(value: object) -> object:
        return f"{value:.2f}" if isinstance(value, float) else value

    ratios = [of("eager", "forward_ratio"), *(of(name, "training_ratio") for name in ("eager", *others))]
    shares = [row.get(f"{part}_share_of_peak") for part in ("forward", "backward")]
    return [
        row.get("operation", row["family"]),
        row.get("dtype"),
        of("ours", "forward_ms_p50"),
        of("ours", "training_ms_p50"),
        *map(short, (*ratios, of("eager", "peak_ratio"), *shares)),
    ]


def tables(models: Models) -> list[ResultTable]:
    """A row for each operation and alternative; one that is wrong or failed has none but its error."""

    def rows() -> Iterator[list[Any]]:
        for name, case in models.items():
            for other, figures in case.get("alternatives", {"-": {}}).items():
                numbers = [figures.get(key) for key in FIGURES]
                yield [f"{name}, {other}", name, other, *numbers, case["error"] or figures.get("note")]

    columns = ("case", "operation", "alternative", *FIGURES, "remark")
    return [ResultTable("kernels", columns, list(rows()), bar=("case", "training_ratio"))]


BENCHMARK = Benchmark(
    measure={f"kernels {family}": partial(measure_kernels, family) for family in FAMILIES},
    judge=judge,
    plot=plot,
    shown=(Metric("kernels_worst_ratio", "slowest operation: time of eager / ours"),),
    stages=("0", "1", "2", "3", "3a"),
    trained=False,
    tables=tables,
    text=text,
)
