"""Criteria of stage 3a: the training with the stack beside the plain one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muse.benchmarks.results import Report, Unmeasured, all_of, at_least, at_most, ratio, saved
from muse.benchmarks.speedup import TARGET_LOSS
from muse.benchmarks.stability import GRADIENT_RANGE
from muse.config import BenchConfig, StackConfig

# Shares of the plain run's time and of its speed, nats, MB.
SAVED_TARGET = 0.25
TOKENS_TARGET = 0.2
LOSSES_APART = 0.05
STACK_MB = 500
DECODE_KEYS = (
    "decode_ratio",
    "decode_plain",
    "decode_speculative",
    "decode_texts",
    "decode_texts_equal",
    "decode_gap",
    "decode_equal_unguessed",
)
PARTS = ("KernelOptimizer", "SemanticCompressor", "InferenceScalingEngine")
# The stack that changes nothing.
PLAIN = StackConfig(level=0, compression="off", speculation=False)


def judge_stack(folder: Path, config: BenchConfig, report: Report) -> None:
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
        "peak_memory_uncompiled": memory["uncompiled"],
        "compression_used": memory["compressed"],
        "compression_ratio": memory["ratio"],
        "compression_gradient_error": memory["gradient_error"],
        "compression_time_ratio": memory["time_ratio"],
        "compression_memory_ratio": ratio(memory["compressed_mb"], memory["uncompressed_mb"]),
    }
    peak, held = memory["stack_mb"], memory["ratio"]
    small = None if peak is None else peak < STACK_MB
    counted = "the stack without compilation" if memory["uncompiled"] else "the stack"
    criteria.append((f"peak memory with {counted} [MB]", peak, f"< {STACK_MB}", small))
    title = "compressed / float32 activations"
    criteria.append((title, held, f"<= {config.stack.ratio}", at_most(held, config.stack.ratio)))
    if config.benchmark.ablation:
        _ablation(folder, config, report)


def _speedup_of(folder: Path, config: BenchConfig, report: Report, asked: bool) -> None:
    """Plain run, run with the stack, and both in turns, for one accumulation."""
    count, label = config.optim.accumulation, _label(config)
    # Random tokens cannot be learned.
    learned = config.data.name != "synthetic"
    # Where an update takes several batches, going on until the loss is reached takes too long.
    goes_on = learned and count == 1
    runs = {}
    for name, stack in (("plain", PLAIN), ("stack", config.stack)):
        print(f"speedup: {name}, {label} ...", flush=True)
        place = str(folder / f"{name}-{count}")
        measurement = "speedup until learned" if goes_on and name == "stack" else "speedup"
        own = dataclasses.replace(config, stack=stack, output_root=place)
        runs[name] = report.measure(measurement, f"{name}, {label}", own, shown_as="speedup")
        _place_checkpoint(runs[name], folder)
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
        "stack_tuning_seconds": ours["tuning_seconds"],
        "stack_compile_seconds": ours["compile_seconds"],
        "plain_loss": plain["loss"],
        "stack_loss": ours["loss"],
        "loss_diff": apart,
        "nan_count": nan,
        "inf_count": inf,
        "grad_norm_min": smallest,
        "grad_norm_max": largest,
        "checkpoints_pass": loads,
        "left_off": [d["name"] for d in ours["decisions"] if not d["kept"]] if ours else None,
        "parameters": ours["parameters"],
    }
    if config.stack.speculation:
        found |= {key: ours[key] for key in DECODE_KEYS}
    if learned:
        step, last = ours["target_step"], config.benchmark.train_steps
        within = step is not None and step <= last if ours else None
        found |= {"target_step": step, "target_within_run": within}
        if ours and step is None and not goes_on:
            report.unjudged[_key("target_step", config, asked)] = (
                f"{last} batches, {label}, do not take the loss to {TARGET_LOSS}, and only the training with "
                "1 batch an update goes on until it is there"
            )
    report.values |= {_key(key, config, asked): value for key, value in found.items()}
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
        title = f"texts that decode to the tokens of plain greedy decoding, {label}"
        same = f"{ours['decode_texts_equal']} of {ours['decode_texts']}" if ours else None
        report.criteria.append((title, same, "all", ours["decode_equal"]))
    if goes_on:
        reached = step is not None if ours else None
        report.criteria.append((f"batch at which the loss is {TARGET_LOSS}, {label}", step, "any", reached))


def _key(name: str, config: BenchConfig, asked: bool) -> str:
    """The key in result.json: the setting that was not asked for has the accumulation in its keys."""
    return name if asked else f"{name}_accumulation_{config.optim.accumulation}"


def _over(runs: dict[str, dict[str, Any]], join: Callable[[list[float]], float], key: str) -> float | None:
    values = [run[key] for run in runs.values()]
    return None if None in values else join(values)


def _place_checkpoint(run: dict[str, Any], folder: Path) -> None:
    """Make the path of a run's checkpoint relative to the folder of the results."""
    if "texts" in run:
        run["texts"]["checkpoint"] = os.path.relpath(run["texts"]["checkpoint"], folder)


def _ablation(folder: Path, config: BenchConfig, report: Report) -> None:
    """Each part of the stack alone, and the stack without it, against the runs there are already.

    A part pays where it saves time both alone and beside the others.
    """
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
        _place_checkpoint(runs[name], folder)
    report.details["ablation"] = {name: run for name, run in runs.items() if run}
    plain = runs["plain"]["seconds"]
    shares = {name: saved(run["seconds"], plain) for name, run in runs.items()}
    report.values["ablation_saved"] = shares
    pays: dict[str, bool | None] = dict.fromkeys(PARTS)
    for part in PARTS:
        alone, whole, without = (shares[key] for key in (f"{part} alone", "all three", f"without {part}"))
        if alone is None or whole is None or without is None:
            print(f"  {part}: not measured")
            continue
        pays[part] = alone > 0 and whole > without
        verdict = "pays" if pays[part] else "does not pay"
        print(
            f"  {part} {verdict}: alone it saves {alone:.1%} of the plain time, beside the others "
            f"{whole - without:.1%}"
        )
    report.values["ablation_pays"] = pays
    left = report.values["left_off"]
    told = "not measured" if left is None else ", ".join(left) or "nothing"
    print(f"  left off by the stack itself: {told}")


def _run_of(report: Report, kind: str, config: BenchConfig) -> dict[str, Any]:
    runs = report.details.get("speedup", {})
    return runs.get(f"{kind}, {_label(config)}", Unmeasured())


def _label(config: BenchConfig) -> str:
    count = config.optim.accumulation
    return f"{count} batches an update" if count > 1 else "1 batch an update"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
