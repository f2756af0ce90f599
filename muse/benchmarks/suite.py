"""The benchmarks of the stages and of the kernels: what is measured, against what, and what passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from muse.benchmarks.cell import measure_apart
from muse.benchmarks.health import GRADIENT_RANGE
from muse.benchmarks.kernels import FAMILIES
from muse.benchmarks.report import Report, Unmeasured, all_of, at_least, at_most, ratio, saved
from muse.benchmarks.setting import settle
from muse.benchmarks.speedup import TARGET_LOSS
from muse.benchmarks.step import baseline_of
from muse.benchmarks.stored import tokens_seen
from muse.config import GRADIENTS, BenchConfig, StackConfig
from muse.dynamics.energy import MONOTONE_SHARE

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
# A kernel counts as slower from here on: two equal functions timed in turns differ by up to 5 %.
SPEED_TARGET = 0.95
# Of stage 3a: shares of the plain run's time and of its speed, nats, MB.
SAVED_TARGET = 0.25
TOKENS_TARGET = 0.2
LOSSES_APART = 0.05
STACK_MB = 500


def run_suite(config: BenchConfig, folder: Path) -> Report:
    """Run the chosen benchmark; ``all`` runs every one, and one that fails does not stop the others.

    Each measurement gets a process of its own; checkpoints go below ``folder``. The keys of one that failed
    are None, ``failures`` says why, and ``all_pass`` is None as long as one criterion is.
    """
    report = Report(measure_apart)
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
    report.judge()
    return report


def _vram(config: BenchConfig, report: Report) -> None:
    values = report.values
    peak = report.measure("vram", _name(config), config)["peak"]
    values["vram_gb"] = peak
    if config.stage.number == "0":
        values |= {"vram_ratio": None, "vram_pass": None}
        return
    baseline = baseline_of(config)
    full = report.measure("vram", _name(baseline), baseline)["peak"]
    half = baseline_of(config, "bf16")
    half_peak = report.measure("vram", _name(half), half)["peak"]
    share = ratio(peak, full)
    values |= {
        "vram_ratio": share,
        "vram_pass": at_most(share, VRAM_TARGET),
        "vram_baseline_gb": full,
        "vram_baseline_bf16_gb": half_peak,
        "vram_ratio_bf16": ratio(peak, half_peak),
    }
    report.criteria.append(("peak memory / stage 0 in fp32", share, f"<= {VRAM_TARGET}", values["vram_pass"]))


def _throughput(config: BenchConfig, report: Report) -> None:
    measured = report.measure("throughput", _name(config), config)
    report.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "products_ratio": measured["products_ratio"],
        "products_and_sdpa_ratio": measured["products_and_sdpa_ratio"],
    }
    if config.stage.number != "0":
        baseline = baseline_of(config)
        other = report.measure("throughput", _name(baseline), baseline)
        report.values["tokens_per_second_ratio"] = ratio(
            measured["tokens_per_second"], other["tokens_per_second"]
        )


def _stability(config: BenchConfig, report: Report) -> None:
    measured = report.measure("stability", _name(config), config)
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


def _gradients(config: BenchConfig, report: Report) -> None:
    measured = report.measure("gradients", _name(config), config)
    smallest, largest = measured["grad_norm_min"], measured["grad_norm_max"]
    low, high = GRADIENT_RANGE
    # A norm that is not finite arrives as None, because JSON has no NaN, and fails.
    in_range = smallest is not None and largest is not None and low <= smallest and largest <= high
    passed = in_range if measured else None
    report.values |= {"grad_norm_min": smallest, "grad_norm_max": largest, "gradient_pass": passed}
    report.criteria.append(("smallest gradient norm", smallest, f">= {low:g}", passed))
    report.criteria.append(("largest gradient norm", largest, f"<= {high:g}", passed))


def _perplexity(config: BenchConfig, report: Report) -> None:
    measured = report.measure("perplexity", _name(config), config)
    values = report.values
    values |= {"ppl": measured["ppl"], "ppl_trained": measured["trained"]}
    if config.stage.number == "0":
        values |= {"ppl_ratio": None, "ppl_pass": None}
        return
    baseline = baseline_of(config)
    other = _baseline_perplexity(config, baseline, report)
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


def _baseline_perplexity(config: BenchConfig, baseline: BenchConfig, report: Report) -> dict[str, Any]:
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
    return report.measure("perplexity", _name(baseline), baseline)


def _kernels(config: BenchConfig, report: Report) -> None:
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
    passed = all_of([row["correct"] for row in rows.values()])
    if worst is not None and ratios[worst] < SPEED_TARGET:
        passed = False
    report.values |= {
        f"{key}_ratio": None if worst is None else ratios[worst],
        f"{key}_case": worst,
    }
    where = f" ({worst})" if worst is not None else ""
    report.criteria.append((title + where, report.values[f"{key}_ratio"], f">= {SPEED_TARGET}", passed))


def _flow_vram(config: BenchConfig, report: Report) -> None:
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
    small, less = at_most(peaks["exact"], FLOW_VRAM_GB), at_least(reduction, FLOW_VRAM_REDUCTION)
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
        ("peak memory, exact [GB]", peaks["exact"], f"< {FLOW_VRAM_GB}", small),
        ("less than full backpropagation", reduction, f">= {FLOW_VRAM_REDUCTION}", less),
        (
            "reconstruction error",
            missed,
            f"< {RECONSTRUCTION_TARGET:g}",
            at_most(missed, RECONSTRUCTION_TARGET),
        ),
        ("fallbacks", fallbacks, "= 0", at_most(fallbacks, 0)),
    ]


def _flow_throughput(config: BenchConfig, report: Report) -> None:
    measured = report.measure("modes", _name(config), config)
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
    report.criteria.append((title, share, f"<= {FLOW_TIME_TARGET}", at_most(share, FLOW_TIME_TARGET)))


def _energy(config: BenchConfig, report: Report) -> None:
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


def _flow_perplexity(config: BenchConfig, report: Report) -> None:
    baseline = baseline_of(config, stage_number="1")
    real = baseline_of(config)
    own = report.measure("perplexity", _name(config), config)
    one = _baseline_perplexity(config, baseline, report)
    trained_here = config.benchmark.checkpoint is None and baseline.benchmark.checkpoint is None
    zero = report.measure("perplexity", _name(real), real) if trained_here else Unmeasured()
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
        "ppl_target": FLOW_PPL_TARGET,
        "ppl_pass": at_most(share, FLOW_PPL_TARGET),
        "ppl_trained": own["trained"],
        "ppl_baseline_trained": one["trained"],
        "parameters_apart": apart,
    }
    title = f"perplexity / stage 1 ({own['trained']})"
    report.criteria.append((title, share, f"<= {FLOW_PPL_TARGET}", values["ppl_pass"]))
    equal = None if apart is None else abs(apart) <= PARAMETERS_APART
    report.criteria.append(("parameters / stage 1 - 1", apart, f"within {PARAMETERS_APART}", equal))


def _adjoint(config: BenchConfig, report: Report) -> None:
    measured = report.run("adjoint", config)
    if measured:
        report.details["adjoint"] = measured["methods"]
    off = measured["exact_gradient_error"]
    report.values |= {key: measured[key] for key in ADJOINT_KEYS}
    for method in ("midpoint", "rk4"):
        times = measured[f"adjoint_time_ratio_{method}"]
        passed = None if times is None else times > 1
        report.criteria.append((f"torchdiffeq {method} / exact leapfrog, time", times, "> 1", passed))
    report.criteria.append(("gradient error of exact", off, "<= 1e-05", at_most(off, 1e-5)))


DECODE_KEYS = (
    "decode_ratio",
    "decode_plain",
    "decode_speculative",
    "decode_texts",
    "decode_texts_equal",
    "decode_gap",
    "decode_equal_unguessed",
)
# The stack that changes nothing.
PLAIN = StackConfig(level=0, compression="off", speculation=False)


def _speedup(folder: Path, config: BenchConfig, report: Report) -> None:
    """Both settings of the accumulation: the one asked for, and an update from every batch."""
    asked = config.optim.accumulation
    for accumulation in dict.fromkeys((asked, 1)):
        optim = dataclasses.replace(config.optim, accumulation=accumulation)
        _speedup_of(folder, dataclasses.replace(config, optim=optim), report, accumulation == asked)
    values, criteria = report.values, report.criteria
    memory = report.measure("speedup memory", "stack", config)
    values |= {
        "plain_memory_mb": memory["plain_mb"],
        "peak_memory_mb": memory["stack_mb"],
        "compression_used": memory["compressed"],
        "compression_ratio": memory["ratio"],
        "compression_gradient_error": memory["gradient_error"],
        "compression_time_ratio": memory["time_ratio"],
        "compression_memory_ratio": ratio(memory["compressed_mb"], memory["uncompressed_mb"]),
    }
    peak, held = memory["stack_mb"], memory["ratio"]
    small = None if peak is None else peak < STACK_MB
    criteria.append(("peak memory with the stack [MB]", peak, f"< {STACK_MB}", small))
    title = "compressed / float32 activations"
    criteria.append((title, held, f"<= {config.stack.ratio}", at_most(held, config.stack.ratio)))
    if config.benchmark.ablation:
        _ablation(folder, config, report)


def _speedup_of(folder: Path, config: BenchConfig, report: Report, asked: bool) -> None:
    """Plain run, run with the stack, and both in turns, for one accumulation."""
    count, label = config.optim.accumulation, _label(config)
    # Random tokens cannot be learned; few updates take too long.
    learns = count == 1 and config.data.name != "synthetic"
    runs = {}
    for name, stack in (("plain", PLAIN), ("stack", config.stack)):
        print(f"speedup: {name}, {label} ...", flush=True)
        place = str(folder / f"{name}-{count}")
        measurement = "speedup until learned" if learns and name == "stack" else "speedup"
        own = dataclasses.replace(config, stack=stack, output_root=place)
        runs[name] = report.measure(measurement, f"{name}, {label}", own, shown_as="speedup")
    print(f"speedup: in turns, {label} ...", flush=True)
    pairs = report.measure("speedup pairs", label, config)
    plain, ours = runs["plain"], runs["stack"]
    if asked:
        for decision in ours["decisions"] or []:
            print(f"  {decision['name']}: {decision['why']}")
    less = saved(ours["seconds"], plain["seconds"])
    rates = ratio(ours["tokens_per_second"], plain["tokens_per_second"])
    faster = None if rates is None else rates - 1
    losses = [run[key] for run in runs.values() for key in ("loss", "valid_loss")]
    apart = None if None in losses else max(abs(a - b) for a, b in zip(losses[:2], losses[2:], strict=True))
    low, high = GRADIENT_RANGE
    smallest, largest = _over(runs, min, "grad_norm_min"), _over(runs, max, "grad_norm_max")
    nan, inf = (_over(runs, sum, key) for key in ("nan_count", "inf_count"))
    not_finite = None if nan is None or inf is None else nan + inf
    loads = all_of([run["checkpoint_loads"] for run in runs.values()])
    found = {
        "speedup_pct": _percent(less),
        "speedup_paired_pct": _percent(pairs["saved"]),
        "speedup_paired_p20_pct": _percent(pairs["saved_p20"]),
        "speedup_paired_p80_pct": _percent(pairs["saved_p80"]),
        "throughput_improvement_pct": _percent(faster),
        "plain_update_ms": pairs["plain_ms"],
        "stack_update_ms": pairs["stack_ms"],
        "plain_seconds": plain["seconds"],
        "stack_seconds": ours["seconds"],
        "plain_loss": plain["loss"],
        "stack_loss": ours["loss"],
        "loss_diff": apart,
        "nan_count": nan,
        "inf_count": inf,
        "grad_norm_min": smallest,
        "grad_norm_max": largest,
        "checkpoints_pass": loads,
        "parameters": ours["parameters"],
    }
    report.values |= found if asked else {f"{key}_accumulation_{count}": found[key] for key in found}
    report.criteria += [
        (f"time saved, whole run, {label}", less, f">= {SAVED_TARGET}", at_least(less, SAVED_TARGET)),
        (
            f"time saved, in turns, {label}",
            pairs["saved"],
            f">= {SAVED_TARGET}",
            at_least(pairs["saved"], SAVED_TARGET),
        ),
        (f"throughput gained, {label}", faster, f">= {TOKENS_TARGET}", at_least(faster, TOKENS_TARGET)),
        (f"final losses apart, {label}", apart, f"<= {LOSSES_APART}", at_most(apart, LOSSES_APART)),
        (f"NaN and Inf, {label}", not_finite, "= 0", at_most(not_finite, 0)),
        (f"smallest gradient norm, {label}", smallest, f">= {low:g}", at_least(smallest, low)),
        (f"largest gradient norm, {label}", largest, f"<= {high:g}", at_most(largest, high)),
        (f"checkpoints load, {label}", loads, "yes", loads),
    ]
    if config.stack.speculation:
        report.values |= {key: ours[key] for key in DECODE_KEYS}
        title = f"texts that decode to the tokens of plain greedy decoding, {label}"
        same = f"{ours['decode_texts_equal']} of {ours['decode_texts']}" if ours else None
        report.criteria.append((title, same, "all", ours["decode_equal"]))
    if learns:
        step = ours["target_step"]
        within = step is not None and step <= config.benchmark.train_steps
        report.values |= {"target_step": step, "target_within_run": within}
        reached = step is not None if ours else None
        report.criteria.append((f"batch at which the loss is {TARGET_LOSS}", step, "any", reached))


def _over(runs: dict[str, dict[str, Any]], join: Callable[[list[float]], float], key: str) -> float | None:
    values = [run[key] for run in runs.values()]
    return None if None in values else join(values)


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
    runs = {"plain": _run_of(report, "plain", config)}
    for name, variant in variants.items():
        print(f"ablation: {name} ...", flush=True)
        place = str(folder / "ablation" / name.replace(" ", "-"))
        own = dataclasses.replace(config, stack=variant, output_root=place)
        runs[name] = report.run("speedup", own, name)
    report.details["ablation"] = {name: run for name, run in runs.items() if run}
    plain = runs["plain"]["seconds"]
    shares = {name: saved(run["seconds"], plain) for name, run in runs.items()}
    report.values["ablation_saved"] = shares
    for part in ("KernelOptimizer", "SemanticCompressor", "InferenceScalingEngine"):
        alone, whole, without = (shares[key] for key in (f"{part} alone", "all three", f"without {part}"))
        if alone is None or whole is None or without is None:
            print(f"  {part}: not measured")
            continue
        verdict = "pays" if alone > 0 and whole > without else "does not pay"
        print(
            f"  {part} {verdict}: alone it saves {alone:.1%} of the plain time, beside the others "
            f"{whole - without:.1%}"
        )
    left = [d["name"] for d in _run_of(report, "stack", config)["decisions"] or [] if not d["kept"]]
    print(f"  left off by the stack itself: {', '.join(left) or 'nothing'}")


def _run_of(report: Report, kind: str, config: BenchConfig) -> dict[str, Any]:
    runs = report.details.get("speedup", {})
    return runs.get(f"{kind}, {_label(config)}", Unmeasured())


def _label(config: BenchConfig) -> str:
    count = config.optim.accumulation
    return f"{count} batches an update" if count > 1 else "1 batch an update"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _name(config: BenchConfig) -> str:
    return f"stage {config.stage.number} {config.stage.precision}"
