"""The benchmarks of stages 0 and 1 and of the kernels: what is measured, against what, and what passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from muse.benchmarks.cell import measure_apart
from muse.benchmarks.health import GRADIENT_RANGE
from muse.benchmarks.kernels import FAMILIES
from muse.benchmarks.step import baseline_of
from muse.config import BenchConfig
from muse.errors import RunError

PPL_TARGET = 1.03
VRAM_TARGET = 0.52
# A kernel counts as slower from here on: two equal functions timed in turns differ by up to 5 %.
SPEED_TARGET = 0.95


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        values: the keys of result.json; a criterion that could not be measured is None.
        details: everything measured, by measurement and model.
        criteria: rows of the table: criterion, measured, target, whether it passes.
    """

    values: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    criteria: list[tuple[str, object, str, bool | None]] = field(default_factory=list)


def run_suite(config: BenchConfig) -> Report:
    """Run the chosen benchmark; ``all`` runs every one, and one that fails does not stop the others.

    Each measurement gets a process of its own. ``all_pass`` is None as long as one criterion is.
    """
    report = Report()
    chosen = config.benchmark.name
    for name, benchmark in (
        ("vram", _vram),
        ("throughput", _throughput),
        ("stability", _stability),
        ("gradients", _gradients),
        ("perplexity", _perplexity),
    ):
        if chosen in (name, "all"):
            print(f"{name} ...", flush=True)
            benchmark(config, report)
    if chosen == "kernels":
        _kernels(config, report)
    passes = [passed for *_, passed in report.criteria]
    report.values["all_pass"] = None if None in passes or not passes else all(passes)
    return report


def _measure(report: Report, measurement: str, model: str, config: BenchConfig) -> dict[str, Any]:
    values = measure_apart(measurement, config)
    report.details.setdefault(measurement, {})[model] = values
    return values


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None


def _at_most(value: float | None, target: float) -> bool | None:
    return None if value is None else value <= target


def _vram(config: BenchConfig, report: Report) -> None:
    values = report.values
    peak = _measure(report, "vram", _name(config), config)["peak"]
    values["vram_gb"] = peak
    if config.stage.number == 0:
        values |= {"vram_ratio": None, "vram_pass": None}
        return
    baseline = baseline_of(config)
    full = _measure(report, "vram", _name(baseline), baseline)["peak"]
    half = baseline_of(config, "bf16")
    half_peak = _measure(report, "vram", _name(half), half)["peak"]
    ratio = peak / full
    values |= {
        "vram_ratio": ratio,
        "vram_pass": ratio <= VRAM_TARGET,
        "vram_baseline_gb": full,
        "vram_baseline_bf16_gb": half_peak,
        "vram_ratio_bf16": peak / half_peak,
    }
    report.criteria.append(("peak memory / stage 0 in fp32", ratio, f"<= {VRAM_TARGET}", values["vram_pass"]))


def _throughput(config: BenchConfig, report: Report) -> None:
    measured = _measure(report, "throughput", _name(config), config)
    report.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "products_ratio": measured["products_ratio"],
        "products_and_sdpa_ratio": measured["products_and_sdpa_ratio"],
    }
    if config.stage.number != 0:
        baseline = baseline_of(config)
        other = _measure(report, "throughput", _name(baseline), baseline)
        report.values["tokens_per_second_ratio"] = _ratio(
            measured["tokens_per_second"], other["tokens_per_second"]
        )


def _stability(config: BenchConfig, report: Report) -> None:
    measured = _measure(report, "stability", _name(config), config)
    passed = measured["nan_count"] == 0 and measured["inf_count"] == 0
    report.values |= {
        "nan_count": measured["nan_count"],
        "inf_count": measured["inf_count"],
        "stability_pass": passed,
    }
    count = measured["nan_count"] + measured["inf_count"]
    report.criteria.append((f"NaN and Inf in {measured['inputs']} random inputs", count, "= 0", passed))


def _gradients(config: BenchConfig, report: Report) -> None:
    measured = _measure(report, "gradients", _name(config), config)
    smallest, largest = measured["grad_norm_min"], measured["grad_norm_max"]
    low, high = GRADIENT_RANGE
    # A norm that is not finite arrives as None, because JSON has no NaN, and fails.
    passed = smallest is not None and largest is not None and low <= smallest and largest <= high
    report.values |= {"grad_norm_min": smallest, "grad_norm_max": largest, "gradient_pass": passed}
    report.criteria.append(("smallest gradient norm", smallest, f">= {low:g}", passed))
    report.criteria.append(("largest gradient norm", largest, f"<= {high:g}", passed))


def _perplexity(config: BenchConfig, report: Report) -> None:
    measured = _measure(report, "perplexity", _name(config), config)
    values = report.values
    values |= {"ppl": measured["ppl"], "ppl_trained": measured["trained"]}
    if config.stage.number == 0:
        values |= {"ppl_ratio": None, "ppl_pass": None}
        return
    baseline = baseline_of(config)
    other = _measure(report, "perplexity", _name(baseline), baseline)
    ratio = _ratio(measured["ppl"], other["ppl"])
    values |= {
        "ppl_ratio": ratio,
        "ppl_pass": _at_most(ratio, PPL_TARGET),
        "ppl_baseline": other["ppl"],
        "ppl_baseline_trained": other["trained"],
    }
    report.criteria.append(
        (f"perplexity / stage 0 ({measured['trained']})", ratio, f"<= {PPL_TARGET}", values["ppl_pass"])
    )


def _kernels(config: BenchConfig, report: Report) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        print(f"kernels: {family} ...", flush=True)
        try:
            measured = measure_apart(f"kernels {family}", config)
            rows |= {name: row | {"device": measured["device"]} for name, row in measured["cases"].items()}
        except RunError as error:
            # The other families are measured all the same.
            print(f"  {error}", flush=True)
            rows[family] = {"family": family, "correct": None, "error": str(error)}
    report.details["kernels"] = rows
    correct = [row["correct"] for row in rows.values()]
    values = report.values
    values["kernels_correct"] = _all(correct)
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


def _all(passes: list[bool | None]) -> bool | None:
    """False as soon as one is, else None as long as one is."""
    return False if False in passes else None if None in passes or not passes else True


def _speed_criterion(
    report: Report, rows: dict[str, dict[str, Any]], other: str, key: str, title: str
) -> None:
    """The smallest ratio of the alternative's time to ours, forward or with backward, and whose it is.

    The backward pass of a flow, which computes its states again, is held against checkpointing.
    """
    ratios = {}
    for name, row in rows.items():
        if alternatives := row.get("alternatives"):
            ratios[f"{name}, forward"] = alternatives[other]["forward_ratio"]
            recomputing = alternatives.get("checkpoint", alternatives[other])
            ratios[f"{name}, with backward"] = recomputing["training_ratio"]
    worst = min(ratios, key=ratios.__getitem__, default=None)
    # What was not measured, because it is wrong or failed, is no pass.
    passed = _all([row["correct"] for row in rows.values()])
    if worst is not None and ratios[worst] < SPEED_TARGET:
        passed = False
    report.values |= {
        f"{key}_ratio": None if worst is None else ratios[worst],
        f"{key}_case": worst,
    }
    where = f" ({worst})" if worst is not None else ""
    report.criteria.append((title + where, report.values[f"{key}_ratio"], f">= {SPEED_TARGET}", passed))


def _name(config: BenchConfig) -> str:
    return f"stage {config.stage.number} {config.stage.precision}"
