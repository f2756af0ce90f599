"""Criteria of the operations of kernels/: right, and no slower than what one would use instead."""

from __future__ import annotations

from typing import Any

from muse.benchmarks.kernels import FAMILIES
from muse.benchmarks.results import Report, all_of
from muse.config import BenchConfig

# A kernel counts as slower from here on: two equal functions timed in turns differ by up to 5 %.
SPEED_TARGET = 0.95


def judge_kernels(config: BenchConfig, report: Report) -> None:
    """Every family of operations, in a process each."""
    rows: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        print(f"kernels: {family} ...", flush=True)
        measured = report.run(f"kernels {family}", config)
        if measured:
            rows |= {name: row | {"device": measured["device"]} for name, row in measured["cases"].items()}
        else:
            rows[family] = {
                "family": family, "correct": None, "error": report.failures[f"kernels {family}"],
            }  # fmt: skip
    report.details["kernels"] = rows
    correct = [row["correct"] for row in rows.values()]
    values = report.values
    values["kernels_correct"] = all_of(correct)
    for name, row in rows.items():
        for other in ("eager", "SDPA"):
            figures = row.get("alternatives", {}).get(other)
            if figures is not None:
                key = f"{name.replace(', ', ' ')} {other}_ratio".lower()
                values["_".join(key.replace("+", "").split())] = figures["training_ratio"]
    count = f"{sum(passed is True for passed in correct)} of {len(correct)}"
    report.criteria.append(("every operation is correct", count, "all", values["kernels_correct"]))
    _speed_criterion(report, rows, "eager", "kernels_worst", "no operation slower than plain eager")
    real = {
        name: row
        for name, row in rows.items()
        if row.get("operation", name) in ("attention", "attention real")
    }
    _speed_criterion(report, real, "SDPA", "kernels_sdpa", "real attention no slower than SDPA")


def _speed_criterion(
    report: Report, rows: dict[str, dict[str, Any]], other: str, key: str, title: str
) -> None:
    """The smallest ratio of the alternative's time to ours, forward or with backward, and whose it is.

    A flow is held against the same maths: plain code that adds whole numbers and subtracts them again.
    """
    ratios = {}
    for name, row in rows.items():
        if alternatives := row.get("alternatives"):
            same = alternatives.get("fixed point", alternatives[other])
            ratios[f"{name}, forward"] = same["forward_ratio"]
            ratios[f"{name}, with backward"] = same["training_ratio"]
    worst = min(ratios, key=ratios.__getitem__, default=None)
    # What was not measured, because it is wrong or failed, is no pass.
    passed = all_of([row["correct"] for row in rows.values()])
    if worst is not None and ratios[worst] < SPEED_TARGET:
        passed = False
    report.values |= {
        f"{key}_ratio": None if worst is None else ratios[worst],
        f"{key}_case": worst,
    }
    where = f" ({worst})" if worst is not None else ""
    report.criteria.append((title + where, report.values[f"{key}_ratio"], f">= {SPEED_TARGET}", passed))
