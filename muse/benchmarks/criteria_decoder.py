"""Criteria of stages 0 and 1: each beside the real baseline."""

from __future__ import annotations

from typing import Any

from muse.benchmarks.checkpoint import tokens_seen
from muse.benchmarks.model import baseline_of
from muse.benchmarks.results import Report, Unmeasured, at_most, ratio
from muse.benchmarks.stability import GRADIENT_RANGE
from muse.config import BenchConfig

PPL_TARGET = 1.03
VRAM_TARGET = 0.52


def judge_memory(config: BenchConfig, report: Report) -> None:
    """Peak memory of a training step beside stage 0 in its own precision and in bf16."""
    values = report.values
    peak = report.measure("vram", name_of(config), config)["peak"]
    values["vram_gb"] = peak
    if config.stage.number == "0":
        values |= {"vram_ratio": None, "vram_pass": None}
        return
    baseline = baseline_of(config)
    full = report.measure("vram", name_of(baseline), baseline)["peak"]
    half = baseline_of(config, "bf16")
    half_peak = report.measure("vram", name_of(half), half)["peak"]
    share = ratio(peak, full)
    values |= {
        "vram_ratio": share,
        "vram_pass": at_most(share, VRAM_TARGET),
        "vram_baseline_gb": full,
        "vram_baseline_bf16_gb": half_peak,
        "vram_ratio_bf16": ratio(peak, half_peak),
    }
    report.criteria.append(("peak memory / stage 0 in fp32", share, f"<= {VRAM_TARGET}", values["vram_pass"]))


def judge_throughput(config: BenchConfig, report: Report) -> None:
    """Speed of a training step beside its matrix products and stage 0; nothing is judged."""
    measured = report.measure("throughput", name_of(config), config)
    report.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "products_ratio": measured["products_ratio"],
        "products_and_sdpa_ratio": measured["products_and_sdpa_ratio"],
    }
    if config.stage.number != "0":
        baseline = baseline_of(config)
        other = report.measure("throughput", name_of(baseline), baseline)
        report.values["tokens_per_second_ratio"] = ratio(
            measured["tokens_per_second"], other["tokens_per_second"]
        )


def judge_stability(config: BenchConfig, report: Report) -> None:
    """NaN and Inf in the logits of random inputs."""
    measured = report.measure("stability", name_of(config), config)
    counts = measured["nan_count"], measured["inf_count"]
    count = None if None in counts else sum(counts)
    passed = at_most(count, 0)
    report.values |= {
        "nan_count": measured["nan_count"],
        "inf_count": measured["inf_count"],
        "stability_pass": passed,
    }
    title = f"NaN and Inf in {config.benchmark.inputs} random inputs"
    report.criteria.append((title, count, "= 0", passed))


def judge_gradients(config: BenchConfig, report: Report) -> None:
    """Sizes of the parameters' gradients."""
    measured = report.measure("gradients", name_of(config), config)
    smallest, largest = measured["grad_norm_min"], measured["grad_norm_max"]
    low, high = GRADIENT_RANGE
    # A norm that is not finite arrives as None, because JSON has no NaN, and fails.
    in_range = smallest is not None and largest is not None and low <= smallest and largest <= high
    passed = in_range if measured else None
    report.values |= {"grad_norm_min": smallest, "grad_norm_max": largest, "gradient_pass": passed}
    report.criteria.append(("smallest gradient norm", smallest, f">= {low:g}", passed))
    report.criteria.append(("largest gradient norm", largest, f"<= {high:g}", passed))


def judge_perplexity(config: BenchConfig, report: Report) -> None:
    """Perplexity beside stage 0."""
    measured = report.measure("perplexity", name_of(config), config)
    values = report.values
    values |= {"ppl": measured["ppl"], "ppl_trained": measured["trained"]}
    if config.stage.number == "0":
        values |= {"ppl_ratio": None, "ppl_pass": None}
        return
    baseline = baseline_of(config)
    other = measure_baseline_perplexity(config, baseline, report)
    share = None if "ppl_pass" in report.unjudged else ratio(measured["ppl"], other["ppl"])
    values |= {
        "ppl_ratio": share,
        "ppl_pass": at_most(share, PPL_TARGET),
        "ppl_baseline": other["ppl"],
        "ppl_baseline_trained": other["trained"],
    }
    report.criteria.append(
        (f"perplexity / stage 0 ({measured['trained']})", share, f"<= {PPL_TARGET}", values["ppl_pass"])
    )


def measure_baseline_perplexity(config: BenchConfig, baseline: BenchConfig, report: Report) -> dict[str, Any]:
    """Of the baseline, unless it would be that of a few steps; a comparison that says nothing is unjudged."""
    own, other = config.benchmark.checkpoint, baseline.benchmark.checkpoint
    if own is None and other is None:
        if not config.benchmark.train_steps:
            report.unjudged["ppl_pass"] = (
                "both models are untrained; give benchmark.train_steps or checkpoints"
            )
    elif own is None or other is None:
        missing = "benchmark.checkpoint" if own is None else "benchmark.baseline_checkpoint"
        report.unjudged["ppl_pass"] = (
            f"a checkpoint says nothing beside {config.benchmark.train_steps} steps of training; give "
            f"{missing}, too"
        )
        return Unmeasured()
    elif tokens_seen(own) != tokens_seen(other):
        report.unjudged["ppl_pass"] = (
            f"{own} was trained on {tokens_seen(own):,} tokens and {other} on {tokens_seen(other):,}"
        )
    return report.measure("perplexity", name_of(baseline), baseline)


def name_of(config: BenchConfig) -> str:
    """What a model is called among others."""
    return f"stage {config.stage.number} {config.stage.precision}"
