"""Criteria of stage 2: by way to the gradient, of the energy, beside stage 1 and beside torchdiffeq."""

from __future__ import annotations

import dataclasses
from typing import Any

from muse.benchmarks.criteria_decoder import measure_baseline_perplexity, name_of
from muse.benchmarks.model import baseline_of
from muse.benchmarks.results import Report, Unmeasured, all_of, at_least, at_most, ratio, saved
from muse.config import GRADIENTS, BenchConfig
from muse.dynamics.energy import MONOTONE_SHARE
from muse.measure.gradient_error import ALLOWED

# Against stage 1, in GB, against full backpropagation, and of every token.
PPL_TARGET = 1.02
VRAM_GB = 7.5
VRAM_REDUCTION = 0.7
TIME_TARGET = 1.6
DRIFT_TARGET = 5e-5
RECONSTRUCTION_TARGET = 8e-6
PARAMETERS_APART = 0.03
ADJOINT_KEYS = (
    "adjoint_time_ratio_midpoint",
    "adjoint_time_ratio_rk4",
    "adjoint_gradient_error_midpoint",
    "adjoint_gradient_error_rk4",
    "exact_gradient_error",
    "exact_peak_gb",
    "adjoint_peak_gb",
    "matmul_precision",
    "fallback_count",
    "tokens",
    "channels",
    "hidden",
)


def judge_flow_memory(config: BenchConfig, report: Report) -> None:
    """Peak memory by way to the gradient, and what ``exact`` rebuilds."""
    found: dict[str, dict[str, Any]] = {}
    for gradient in ("exact", "reversible", "checkpoint", "backprop"):
        stage = dataclasses.replace(config.stage, gradient=gradient)
        found[gradient] = report.measure("vram", gradient, dataclasses.replace(config, stage=stage))
    verified = dataclasses.replace(config.stage, gradient="exact", verify=True)
    rebuilt = report.measure("vram", "exact, verified", dataclasses.replace(config, stage=verified))
    peaks = {gradient: measured["peak"] for gradient, measured in found.items()}
    reduction = saved(peaks["exact"], peaks["backprop"])
    missed = rebuilt.get("flow/reconstruction_error")
    counts = [measured["flow/fallbacks"] for measured in (found["exact"], rebuilt)]
    fallbacks = None if None in counts else int(max(counts))
    if rebuilt and missed is None:
        report.unjudged["reconstruction_error"] = "every flow fell back to checkpointing and rebuilt nothing"
    values = report.values
    small, less = at_most(peaks["exact"], VRAM_GB), at_least(reduction, VRAM_REDUCTION)
    values |= {
        "vram_symplectic_gb": peaks["exact"],
        "vram_full_backprop_gb": peaks["backprop"],
        "vram_reversible_gb": peaks["reversible"],
        "vram_checkpoint_gb": peaks["checkpoint"],
        "vram_activations_gb": found["exact"]["activations"],
        "vram_reduction_ratio": reduction,
        "vram_reduction_pct": None if reduction is None else 100 * reduction,
        "vram_pass": all_of([small, less]),
        "reconstruction_error": missed,
        "reconstruction_error_reversible": found["reversible"].get("flow/reconstruction_error"),
        "fallback_count": fallbacks,
    }
    report.criteria += [
        ("peak memory, exact [GB]", peaks["exact"], f"< {VRAM_GB}", small),
        ("less than full backpropagation", reduction, f">= {VRAM_REDUCTION}", less),
        (
            "reconstruction error",
            missed,
            f"< {RECONSTRUCTION_TARGET:g}",
            at_most(missed, RECONSTRUCTION_TARGET),
        ),
        ("fallbacks", fallbacks, "= 0", at_most(fallbacks, 0)),
    ]


def judge_modes(config: BenchConfig, report: Report) -> None:
    """Gradients and times of a step by way to the gradient."""
    measured = report.measure("modes", name_of(config), config)
    share, correct = measured["ratio_exact_to_backprop"], measured["gradients_correct"]
    if correct is False:
        report.unjudged["step_ratio_backprop"] = "the time of a wrong gradient means nothing"
    elif measured["fallbacks_exact"]:
        report.unjudged["step_ratio_backprop"] = (
            f"{measured['fallbacks_exact']} flows of exact went on with checkpointing, whose time it would be"
        )
    errors = [measured[f"gradient_error_{mode}"] for mode in GRADIENTS]
    # An error that is not finite arrives as None.
    worst = None if None in errors else max(errors)
    allowed = measured["gradient_error_allowed"]
    target = "finite" if allowed is None else f"<= {allowed:.2g}"
    report.criteria.append(("gradient error of the worst mode", worst, target, correct))
    report.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "step_ratio_backprop": share,
        "step_ratio_checkpoint": ratio(share, measured["ratio_checkpoint_to_backprop"]),
        "gradient_error": measured["gradient_error_exact"],
        "gradients_correct": correct,
    }
    title = "time of a step, exact / full backpropagation"
    report.criteria.append((title, share, f"<= {TIME_TARGET}", at_most(share, TIME_TARGET)))


def judge_energy(config: BenchConfig, report: Report) -> None:
    """Drift of the energy, untrained and trained."""
    chosen = config.benchmark
    measured = {}
    untrained = dataclasses.replace(chosen, checkpoint=None)
    measured["untrained"] = report.measure(
        "energy", "untrained", dataclasses.replace(config, benchmark=untrained)
    )
    if chosen.checkpoint is not None:
        measured["trained"] = report.measure("energy", "trained", config)
    elif chosen.train_steps:
        measured["trained"] = report.measure("trained energy", "trained", config, shown_as="energy")
    last = measured.get("trained", measured["untrained"])
    if "trained" not in measured:
        # The criterion is about both.
        measured["trained"] = Unmeasured()
        report.unjudged["energy_pass"] = (
            "only the untrained model was measured; give benchmark.checkpoint or benchmark.train_steps"
        )
    drifts = {name: values["max_drift"] for name, values in measured.items()}
    shares = {name: values["monotone_share"] for name, values in measured.items()}
    kept = all_of([at_most(drift, DRIFT_TARGET) for drift in drifts.values()])
    swings = all_of([at_most(share, MONOTONE_SHARE) for share in shares.values()])
    report.values |= {
        **{key: last[key] for key in ("mean_energy", "max_drift", "mean_drift", "energy_trajectory")},
        "max_drift_untrained": drifts["untrained"],
        "max_drift_leapfrog": last["leapfrog_max_drift"],
        "curvature_dt2": last["curvature_dt2"],
        "monotonic_violation": None if swings is None else not swings,
        "energy_pass": all_of([kept, swings]),
    }
    for name in measured:
        passed = at_most(drifts[name], DRIFT_TARGET)
        report.criteria.append((f"energy drift, {name}", drifts[name], f"< {DRIFT_TARGET:g}", passed))
        share = shares[name]
        passed = at_most(share, MONOTONE_SHARE)
        report.criteria.append((f"monotone tokens, {name}", share, f"<= {MONOTONE_SHARE:g}", passed))


def judge_flow_perplexity(config: BenchConfig, report: Report) -> None:
    """Perplexity beside stage 1, and for show stage 0."""
    baseline = baseline_of(config, stage_number="1")
    real = baseline_of(config)
    own = report.measure("perplexity", name_of(config), config)
    one = measure_baseline_perplexity(config, baseline, report)
    trained_here = config.benchmark.checkpoint is None and baseline.benchmark.checkpoint is None
    zero = report.measure("perplexity", name_of(real), real) if trained_here else Unmeasured()
    share = None if "ppl_pass" in report.unjudged else ratio(own["ppl"], one["ppl"])
    size = ratio(own["parameters"], one["parameters"])
    apart = None if size is None else size - 1
    values = report.values
    values |= {
        "stage2_ppl": own["ppl"],
        "stage1_ppl": one["ppl"],
        "stage0_ppl": zero["ppl"],
        "ppl_ratio": share,
        "ppl_diff_pct": None if share is None else 100 * (share - 1),
        "ppl_target": PPL_TARGET,
        "ppl_pass": at_most(share, PPL_TARGET),
        "ppl_trained": own["trained"],
        "ppl_baseline_trained": one["trained"],
        "parameters_apart": apart,
    }
    title = f"perplexity / stage 1 ({own['trained']})"
    report.criteria.append((title, share, f"<= {PPL_TARGET}", values["ppl_pass"]))
    equal = None if apart is None else abs(apart) <= PARAMETERS_APART
    report.criteria.append(("parameters / stage 1 - 1", apart, f"within {PARAMETERS_APART}", equal))


def judge_adjoint(config: BenchConfig, report: Report) -> None:
    """Time and gradient beside those of torchdiffeq."""
    measured = report.run("adjoint", config)
    if measured:
        report.details["adjoint"] = measured["methods"]
    off = measured["exact_gradient_error"]
    report.values |= {key: measured[key] for key in ADJOINT_KEYS}
    for method in ("midpoint", "rk4"):
        times = measured[f"adjoint_time_ratio_{method}"]
        passed = None if times is None else times > 1
        report.criteria.append((f"torchdiffeq {method} / exact leapfrog, time", times, "> 1", passed))
    report.criteria.append(("gradient error of exact", off, f"<= {ALLOWED:g}", at_most(off, ALLOWED)))
