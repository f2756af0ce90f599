"""The benchmarks of the stages and of the kernels: what is measured, against what, and what passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from muse.benchmarks.cell import measure_apart
from muse.benchmarks.health import GRADIENT_RANGE
from muse.benchmarks.kernels import FAMILIES
from muse.benchmarks.setting import settle
from muse.benchmarks.speedup import TARGET_LOSS
from muse.benchmarks.step import baseline_of
from muse.config import BenchConfig, StackConfig
from muse.dynamics.energy import MONOTONE_SHARE
from muse.errors import RunError

PPL_TARGET = 1.03
VRAM_TARGET = 0.52
# Of stage 2: against stage 1, in GB, against full backpropagation, and of every token.
FLOW_PPL_TARGET = 1.02
FLOW_VRAM_GB = 7.5
FLOW_VRAM_REDUCTION = 0.7
FLOW_TIME_TARGET = 1.6
DRIFT_TARGET = 5e-5
RECONSTRUCTION_TARGET = 8e-6
PARAMETERS_APART = 0.03
# A kernel counts as slower from here on: two equal functions timed in turns differ by up to 5 %.
SPEED_TARGET = 0.95
# Of stage 3a: shares of the plain run's time and of its speed, nats, MB.
SAVED_TARGET = 0.25
TOKENS_TARGET = 0.2
LOSSES_APART = 0.05
STACK_MB = 500


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


def run_suite(config: BenchConfig, folder: Path) -> Report:
    """Run the chosen benchmark; ``all`` runs every one, and one that fails does not stop the others.

    Each measurement gets a process of its own; checkpoints go below ``folder``. ``all_pass`` is None as long
    as one criterion is.
    """
    report = Report()
    chosen = config.benchmark.name
    flows = config.stage.number == "2"
    benchmarks: dict[str, Callable[[BenchConfig, Report], None]] = {
        "vram": _flow_vram if flows else _vram,
        "throughput": _flow_throughput if flows else _throughput,
        "stability": _stability,
        "gradients": _gradients,
        **({"energy": _energy} if flows else {}),
        "perplexity": _flow_perplexity if flows else _perplexity,
    }
    if config.stage.number == "3a":
        benchmarks = {"speedup": partial(_speedup, folder)}
    apart = {"kernels": _kernels, "adjoint": _adjoint}
    for name, benchmark in (benchmarks if chosen == "all" else {**benchmarks, **apart}).items():
        if chosen in (name, "all"):
            print(f"{name} ...", flush=True)
            benchmark(settle(config, name), report)
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
    if config.stage.number == "0":
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
    if config.stage.number != "0":
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
    if config.stage.number == "0":
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


def _flow_vram(config: BenchConfig, report: Report) -> None:
    peaks: dict[str, float | None] = {}
    for gradient in ("exact", "reversible", "checkpoint", "backprop"):
        stage = dataclasses.replace(config.stage, gradient=gradient)
        try:
            measured = _measure(report, "vram", gradient, dataclasses.replace(config, stage=stage))
        except RunError as error:
            # What does not fit is no reason to throw the others away.
            print(f"  {gradient}: {error}", flush=True)
            measured = {}
        peaks[gradient] = measured.get("peak")
    verified = dataclasses.replace(config.stage, gradient="exact", verify=True)
    rebuilt = _measure(report, "vram", "exact, verified", dataclasses.replace(config, stage=verified))
    reversible = report.details["vram"].get("reversible", {})
    ratio = _ratio(peaks["exact"], peaks["backprop"])
    reduction = None if ratio is None else 1 - ratio
    missed, fallbacks = rebuilt["flow/reconstruction_error"], rebuilt["flow/fallbacks"]
    values = report.values
    small, less = _at_most(peaks["exact"], FLOW_VRAM_GB), _at_most(ratio, 1 - FLOW_VRAM_REDUCTION)
    values |= {
        "vram_symplectic_gb": peaks["exact"],
        "vram_full_backprop_gb": peaks["backprop"],
        "vram_reversible_gb": peaks["reversible"],
        "vram_checkpoint_gb": peaks["checkpoint"],
        "vram_activations_gb": report.details["vram"]["exact"]["activations"] if peaks["exact"] else None,
        "vram_reduction_ratio": reduction,
        "vram_reduction_pct": None if reduction is None else 100 * reduction,
        "vram_pass": _all([small, less]),
        "reconstruction_error": missed,
        "reconstruction_error_reversible": reversible.get("flow/reconstruction_error"),
        "fallback_count": int(fallbacks),
    }
    report.criteria += [
        ("peak memory, exact [GB]", peaks["exact"], f"< {FLOW_VRAM_GB}", small),
        ("less than full backpropagation", reduction, f">= {FLOW_VRAM_REDUCTION}", less),
        ("reconstruction error", missed, f"< {RECONSTRUCTION_TARGET:g}", missed < RECONSTRUCTION_TARGET),
        ("fallbacks", int(fallbacks), "= 0", fallbacks == 0),
    ]


def _flow_throughput(config: BenchConfig, report: Report) -> None:
    measured = _measure(report, "modes", _name(config), config)
    ratio = measured["ratio_exact_to_backprop"]
    report.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "step_ratio_backprop": ratio,
        "step_ratio_checkpoint": _ratio(ratio, measured["ratio_checkpoint_to_backprop"]),
        "gradient_error": measured["gradient_error_exact"],
    }
    title = "time of a step, exact / full backpropagation"
    report.criteria.append((title, ratio, f"<= {FLOW_TIME_TARGET}", _at_most(ratio, FLOW_TIME_TARGET)))


def _energy(config: BenchConfig, report: Report) -> None:
    chosen = config.benchmark
    measured = {}
    untrained = dataclasses.replace(chosen, checkpoint=None)
    measured["untrained"] = _measure(
        report, "energy", "untrained", dataclasses.replace(config, benchmark=untrained)
    )
    if chosen.checkpoint is not None:
        measured["trained"] = _measure(report, "energy", "trained", config)
    elif chosen.train_steps:
        measured["trained"] = _measure(report, "trained energy", "trained", config)
        report.details["energy"]["trained"] = report.details.pop("trained energy")["trained"]
    last = measured.get("trained", measured["untrained"])
    drifts = {name: values["max_drift"] for name, values in measured.items()}
    shares = {name: values["monotone_share"] for name, values in measured.items()}
    kept = _all([_at_most(drift, DRIFT_TARGET) for drift in drifts.values()])
    swings = _all([_at_most(share, MONOTONE_SHARE) for share in shares.values()])
    report.values |= {
        **{key: last[key] for key in ("mean_energy", "max_drift", "mean_drift", "energy_trajectory")},
        "max_drift_untrained": drifts["untrained"],
        "max_drift_leapfrog": last["leapfrog_max_drift"],
        "curvature_dt2": last["curvature_dt2"],
        "monotonic_violation": None if swings is None else not swings,
        "energy_pass": _all([kept, swings]),
    }
    for name in measured:
        passed = _at_most(drifts[name], DRIFT_TARGET)
        report.criteria.append((f"energy drift, {name}", drifts[name], f"< {DRIFT_TARGET:g}", passed))
        share = shares[name]
        passed = _at_most(share, MONOTONE_SHARE)
        report.criteria.append((f"monotone tokens, {name}", share, f"<= {MONOTONE_SHARE:g}", passed))


def _flow_perplexity(config: BenchConfig, report: Report) -> None:
    baseline = baseline_of(config, stage_number="1")
    real = baseline_of(config)
    own, one, zero = (_measure(report, "perplexity", _name(c), c) for c in (config, baseline, real))
    ratio = _ratio(own["ppl"], one["ppl"])
    apart = own["parameters"] / one["parameters"] - 1
    values = report.values
    values |= {
        "stage2_ppl": own["ppl"],
        "stage1_ppl": one["ppl"],
        "stage0_ppl": zero["ppl"],
        "ppl_ratio": ratio,
        "ppl_diff_pct": None if ratio is None else 100 * (ratio - 1),
        "ppl_target": FLOW_PPL_TARGET,
        "ppl_pass": _at_most(ratio, FLOW_PPL_TARGET),
        "ppl_trained": own["trained"],
        "ppl_baseline_trained": one["trained"],
        "parameters_apart": apart,
    }
    title = f"perplexity / stage 1 ({own['trained']})"
    report.criteria.append((title, ratio, f"<= {FLOW_PPL_TARGET}", values["ppl_pass"]))
    equal = abs(apart) <= PARAMETERS_APART
    report.criteria.append(("parameters / stage 1 - 1", apart, f"within {PARAMETERS_APART}", equal))


def _adjoint(config: BenchConfig, report: Report) -> None:
    measured = measure_apart("adjoint", config)
    report.details["adjoint"] = measured["methods"]
    report.values |= {k: v for k, v in measured.items() if isinstance(v, int | float)}
    for method in ("midpoint", "rk4"):
        ratio = measured[f"adjoint_time_ratio_{method}"]
        report.criteria.append((f"torchdiffeq {method} / exact leapfrog, time", ratio, "> 1", ratio > 1))
    off = measured["exact_gradient_error"]
    report.criteria.append(("gradient error of exact", off, "<= 1e-05", off <= 1e-5))


PLAIN = StackConfig(level=0, compression="off", speculation=False)


def _speedup(folder: Path, config: BenchConfig, report: Report) -> None:
    """Both settings of the accumulation: the one asked for, and an update from every batch."""
    asked = config.optim.accumulation
    for accumulation in dict.fromkeys((asked, 1)):
        optim = dataclasses.replace(config.optim, accumulation=accumulation)
        _speedup_of(folder, dataclasses.replace(config, optim=optim), report, accumulation == asked)
    values, criteria = report.values, report.criteria
    memory = _measure(report, "speedup memory", "stack", config)
    values |= {
        "plain_memory_mb": memory["plain_mb"],
        "peak_memory_mb": memory["stack_mb"],
        "compression_used": memory["compressed"],
        "compression_ratio": memory["ratio"],
        "compression_gradient_error": memory["gradient_error"],
        "compression_time_ratio": memory["time_ratio"],
        "compression_memory_ratio": memory["compressed_mb"] / memory["uncompressed_mb"],
    }
    peak = memory["stack_mb"]
    criteria.append(("peak memory with the stack [MB]", peak, f"< {STACK_MB}", peak < STACK_MB))
    ratio = memory["ratio"]
    title = "compressed / float32 activations"
    criteria.append((title, ratio, f"<= {config.stack.ratio}", _at_most(ratio, config.stack.ratio)))
    if config.benchmark.ablation:
        _ablation(folder, config, report)


def _speedup_of(folder: Path, config: BenchConfig, report: Report, asked: bool) -> None:
    """Plain run, run with the stack, and both in turns, for one accumulation."""
    count = config.optim.accumulation
    label = f"{count} batches an update" if count > 1 else "1 batch an update"
    # Random tokens cannot be learned; few updates take too long.
    learns = count == 1 and config.data.name != "synthetic"
    runs = {}
    for name, stack in (("plain", PLAIN), ("stack", config.stack)):
        print(f"speedup: {name}, {label} ...", flush=True)
        place = str(folder / f"{name}-{count}")
        measurement = "speedup until learned" if learns and name == "stack" else "speedup"
        own = dataclasses.replace(config, stack=stack, output_root=place)
        runs[name] = measure_apart(measurement, own)
        report.details.setdefault("speedup", {})[f"{name}, {label}"] = runs[name]
    print(f"speedup: in turns, {label} ...", flush=True)
    pairs = _measure(report, "speedup pairs", label, config)
    plain, ours = runs["plain"], runs["stack"]
    if asked:
        for decision in ours["decisions"]:
            print(f"  {decision['name']}: {decision['why']}")
    saved = 1 - ours["seconds"] / plain["seconds"]
    faster = ours["tokens_per_second"] / plain["tokens_per_second"] - 1
    apart = max(abs(ours[key] - plain[key]) for key in ("loss", "valid_loss"))
    low, high = GRADIENT_RANGE
    smallest, largest = (
        f(run[key] for run in runs.values()) for f, key in ((min, "grad_norm_min"), (max, "grad_norm_max"))
    )
    loads = all(run["checkpoint_loads"] for run in runs.values())
    found = {
        "speedup_pct": 100 * saved,
        "speedup_paired_pct": 100 * pairs["saved"],
        "speedup_paired_p20_pct": 100 * pairs["saved_p20"],
        "speedup_paired_p80_pct": 100 * pairs["saved_p80"],
        "throughput_improvement_pct": 100 * faster,
        "plain_seconds": plain["seconds"],
        "stack_seconds": ours["seconds"],
        "plain_loss": plain["loss"],
        "stack_loss": ours["loss"],
        "loss_diff": apart,
        "nan_count": 0,
        "grad_norm_min": smallest,
        "grad_norm_max": largest,
        "checkpoints_pass": loads,
        "parameters": ours["parameters"],
    }
    report.values |= found if asked else {f"{key}_accumulation_{count}": found[key] for key in found}
    report.criteria += [
        (f"time saved, whole run, {label}", saved, f">= {SAVED_TARGET}", saved >= SAVED_TARGET),
        (
            f"time saved, in turns, {label}",
            pairs["saved"],
            f">= {SAVED_TARGET}",
            pairs["saved"] >= SAVED_TARGET,
        ),
        (f"throughput gained, {label}", faster, f">= {TOKENS_TARGET}", faster >= TOKENS_TARGET),
        (f"final losses apart, {label}", apart, f"<= {LOSSES_APART}", apart <= LOSSES_APART),
        # A run with one that is not finite ends there.
        (f"NaN and Inf, {label}", 0, "= 0", True),
        (f"smallest gradient norm, {label}", smallest, f">= {low:g}", smallest >= low),
        (f"largest gradient norm, {label}", largest, f"<= {high:g}", largest <= high),
        (f"checkpoints load, {label}", loads, "yes", loads),
    ]
    if config.stack.speculation:
        report.values |= {key: ours[key] for key in ("decode_ratio", "decode_plain", "decode_speculative")}
        title = f"speculative decoding is greedy decoding, {label}"
        report.criteria.append((title, ours["decode_equal"], "yes", ours["decode_equal"]))
    if learns:
        step = ours["target_step"]
        within = step is not None and step <= config.benchmark.train_steps
        report.values |= {"target_step": step, "target_within_run": within}
        report.criteria.append((f"batch at which the loss is {TARGET_LOSS}", step, "any", step is not None))


def _ablation(folder: Path, config: BenchConfig, report: Report) -> None:
    """Each part of the stack alone, and the stack without it, against the runs there are already."""
    stack = config.stack
    forced = dataclasses.replace(stack, compression="on")
    variants = {
        "KernelOptimizer alone": dataclasses.replace(PLAIN, level=stack.level),
        "SemanticCompressor alone": dataclasses.replace(PLAIN, compression="on", ratio=stack.ratio),
        "InferenceScalingEngine alone": dataclasses.replace(PLAIN, speculation=True),
        "all three": dataclasses.replace(forced, speculation=True),
        "without KernelOptimizer": dataclasses.replace(forced, level=0, speculation=True),
        "without SemanticCompressor": dataclasses.replace(stack, compression="off", speculation=True),
        "without InferenceScalingEngine": dataclasses.replace(forced, speculation=False),
    }
    runs = {"plain": next(iter(report.details["speedup"].values()))}
    for name, variant in variants.items():
        print(f"ablation: {name} ...", flush=True)
        place = str(folder / "ablation" / name.replace(" ", "-"))
        runs[name] = measure_apart("speedup", dataclasses.replace(config, stack=variant, output_root=place))
    report.details["ablation"] = runs
    plain = runs["plain"]["seconds"]
    saved = {name: 1 - run["seconds"] / plain for name, run in runs.items()}
    report.values["ablation_saved"] = saved
    for part in ("KernelOptimizer", "SemanticCompressor", "InferenceScalingEngine"):
        gain = saved["all three"] - saved[f"without {part}"]
        verdict = "pays" if saved[f"{part} alone"] > 0 and gain > 0 else "does not pay"
        print(
            f"  {part} {verdict}: alone it saves {saved[f'{part} alone']:.1%} of the plain time, beside the "
            f"others {gain:.1%}"
        )
    left = [d["name"] for d in report.details["speedup"][_stack_run(report)]["decisions"] if not d["kept"]]
    print(f"  left off by the stack itself: {', '.join(left) or 'nothing'}")


def _stack_run(report: Report) -> str:
    return next(name for name in report.details["speedup"] if name.startswith("stack"))


def _name(config: BenchConfig) -> str:
    return f"stage {config.stage.number} {config.stage.precision}"
