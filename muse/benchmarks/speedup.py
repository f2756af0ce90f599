"""``benchmark=speedup``: the same training of stage 3a, plainly and with the optimisation stack."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from muse.acceleration import Execution, InferenceScalingEngine, greedy_decode
from muse.acceleration.plan import MB, Plan, countable, find_plan, memory_of_update
from muse.acceleration.training import StackTraining
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.criteria import GRADIENT_RANGE, all_of, percent, ratio, saved
from muse.benchmarks.decoding import PROMPT, measure_decoding
from muse.benchmarks.results import Results, Unmeasured
from muse.benchmarks.workload import Workload, batch_shape
from muse.config import BenchConfig, StackConfig
from muse.data import TokenData, load_tokens
from muse.errors import ConfigError
from muse.hardware import restored_threads, synchronize
from muse.measure.gradient_error import joined, relative_error
from muse.measure.timing import quantile, times_in_turns
from muse.models import LanguageModel, build_model, count_parameters
from muse.options import changed
from muse.report.plots import draw_lines, subtracted
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import model_tables
from muse.runs.checkpoints import TrainingState, find_checkpoint, load_state, load_weights
from muse.runs.folder import CHECKPOINTS
from muse.training.checkpoint import CheckpointWriter
from muse.training.evaluate import evaluate

EPOCHS = 10
# Of the evaluation and of the sample at the end of each epoch.
EVALUATED_TOKENS = 4096
SAMPLED = 64
# Natural text is said to be learned from here on, by the mean of ten batches; batches until that is given up.
TARGET_LOSS, LONGEST = 6.0, 500
# Shares of the plain run's time and of its speed, nats, MB.
SAVED_TARGET = 0.25
TOKENS_TARGET = 0.2
LOSS_DIFFERENCE = 0.05
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


def _start(config: BenchConfig, device: torch.device) -> tuple[BenchConfig, TokenData, LanguageModel]:
    """The data, and the model with its initial weights: the same for every plan."""
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    _, length = batch_shape(config)
    config = changed(config, model={"vocab_size": data.vocab_size, "seq_len": length})
    model = build_model(config.stage, config.model, data.vocab_size, config.seed).to(device)
    return config, data, model.train()


@restored_threads()
def measure_speedup_run(
    config: BenchConfig, device: torch.device, until: float | None = None
) -> dict[str, Any]:
    """Train in ten epochs as ``config.stack`` says, with an evaluation and a sample after each.

    Args:
        config: ``benchmark.train_steps`` batches, an update after every ``optim.accumulation`` of them. The
            checkpoint is written below ``output_root``.
        device: of the model.
        until: a loss that the training goes on for when it is over, outside of all times.

    Returns:
        ``seconds`` from the initial weights to the last sample, and their parts; ``compile_seconds``, which
        are in them, too, as part of tuning and of training; ``loss`` (mean of the last
        epoch's batches), ``valid_loss``, ``curve`` (the loss of each batch, no mean over some);
        ``tokens_per_second`` of the median batch; ``norm_min`` and ``norm_max`` of whole gradients,
        ``grad_norm_min`` and ``grad_norm_max`` of single parameters;
        ``decisions``; ``texts``, the last sample and where the checkpoint is; ``checkpoint_loads``;
        ``losses_hash``, equal for equal losses; ``nan_count`` and ``inf_count`` among all losses, gradient
        norms and, in the end, elements of parameters;
        ``parameters``; what ``measure_decoding`` returns; ``target_step``, the batch at which the mean of ten
        losses was first at most ``until``, by default ``TARGET_LOSS`` if the training gets there.

    Raises:
        RunError: when a loss or gradient is not finite, or the checkpoint cannot be written.
    """
    config, data, model = _start(config, device)
    batches = config.benchmark.train_steps
    size, length = batch_shape(config)
    began = time.perf_counter()
    plan = find_plan(config, data, model)
    spent = {"tuning": plan.seconds, "training": 0.0, "evaluation": 0.0, "sampling": 0.0}
    torch.manual_seed(config.seed)
    training = StackTraining(config, data, model, plan.execution, plan.compress)
    engine = InferenceScalingEngine(config.stack.speculation_warmup)
    prompt = data.valid[:PROMPT].tolist()
    sampled = max(1, min(SAMPLED, length - PROMPT))
    losses, times = training.losses, training.seconds
    valid_losses: list[float] = []
    sample = prompt

    def end_epoch(batch: int) -> None:
        """Evaluate and sample, where an epoch ends with this batch."""
        nonlocal sample
        if (batch + 1) * EPOCHS // batches == batch * EPOCHS // batches:
            return
        start = time.perf_counter()
        valid_losses.append(_evaluated(training))
        spent["evaluation"] += time.perf_counter() - start
        start = time.perf_counter()
        sample = _sampled(training, engine if config.stack.speculation else None, prompt, sampled)
        spent["sampling"] += time.perf_counter() - start
        print(
            f"  epoch {len(valid_losses)}/{EPOCHS}: loss {losses[batch]:.3f}, "
            f"validation {valid_losses[-1]:.3f}, {size * length / median(times[: batch + 1]):,.0f} tokens/s",
            flush=True,
        )

    for first in range(0, batches, config.optim.accumulation):
        of_update = range(batches)[first : first + config.optim.accumulation]
        training.gradients(of_update)
        # Until the update the weights are those of the one before.
        for batch in of_update[:-1]:
            end_epoch(batch)
        if len(of_update) == config.optim.accumulation:
            training.update()
        end_epoch(of_update[-1])
    spent["training"] = sum(times)
    compiled = plan.execution.compile
    last = losses[-max(1, batches // EPOCHS) :]
    result: dict[str, Any] = {
        "seconds": sum(spent.values()),
        **{f"{part}_seconds": seconds for part, seconds in spent.items()},
        "compile_seconds": plan.compile_seconds + (max(0.0, times[0] - median(times)) if compiled else 0.0),
        "wall_seconds": time.perf_counter() - began,
        "tokens_per_second": size * length / median(times),
        "loss": sum(last) / len(last),
        "valid_loss": valid_losses[-1],
        "updates": batches // config.optim.accumulation,
        "norm_min": min(training.optimizer.norms, default=None),
        "norm_max": max(training.optimizer.norms, default=None),
        "grad_norm_min": training.optimizer.gradient_range[0],
        "grad_norm_max": training.optimizer.gradient_range[1],
        "parameters": count_parameters(model),
        **_not_finite(training, valid_losses),
        "losses_hash": hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16],
        "curve": list(enumerate(losses, 1)),
        "decisions": [dataclasses.asdict(decision) for decision in plan.decisions],
        "texts": {"sample": data.tokenizer.decode(sample) if data.tokenizer is not None else None},
    }
    path, loads = _checkpoint(training, batches, min(valid_losses))
    result["texts"]["checkpoint"] = str(path)
    result["checkpoint_loads"] = loads
    if config.stack.speculation:
        result |= measure_decoding(training, engine, prompt, sampled)
    if until is None:
        result["target_step"] = _batch_of(losses, TARGET_LOSS)
    else:
        result["target_step"] = _reached(training, until)
    return result


def _not_finite(training: StackTraining, valid_losses: list[float]) -> dict[str, int]:
    told = training.losses + valid_losses + training.optimizer.norms
    tensors = [torch.tensor(told), *training.model.parameters()]
    return {
        "nan_count": sum(int(tensor.isnan().sum()) for tensor in tensors),
        "inf_count": sum(int(tensor.isinf().sum()) for tensor in tensors),
    }


def _evaluated(training: StackTraining) -> float:
    precision = torch.bfloat16 if training.execution.products else None
    size, length = batch_shape(training.config)
    with training.execution.eager(training.model):
        found = evaluate(
            training.model,
            training.data.valid,
            None,
            length,
            size,
            limit=EVALUATED_TOKENS,
            precision=precision,
        )
    return found.loss


def _sampled(
    training: StackTraining, engine: InferenceScalingEngine | None, prompt: list[int], tokens: int
) -> list[int]:
    model = training.model.eval()
    with training.execution.eager(model):
        decode = engine.decode if engine is not None else greedy_decode
        ids = decode(model, prompt, tokens)
    model.train()
    return ids


def _checkpoint(training: StackTraining, step: int, loss: float) -> tuple[Path, bool]:
    """Save the training; where it is, and whether another model loads the same weights from it."""
    run = Path(training.config.output_root)
    state = TrainingState(step=step, scaler={}, random=[], best_loss=loss, wandb_id=None)
    tensors = {"model": training.model.state_dict(), "optimizer": training.optimizer.optimizer.state_dict()}
    CheckpointWriter(run / CHECKPOINTS).save(tensors, state, best=True)
    path = find_checkpoint(run)
    assert path is not None
    config = training.config
    other = build_model(config.stage, config.model, training.data.vocab_size, config.seed + 1)
    load_weights(path, other)
    saved = training.model.state_dict()
    equal = all(torch.equal(value, saved[name].cpu()) for name, value in other.state_dict().items())
    return path, equal and load_state(path).step == step


def _batch_of(losses: list[float], target: float) -> int | None:
    """The batch at which the mean of ten losses is first at most ``target``."""
    ends = range(10, len(losses) + 1)
    return next((end for end in ends if sum(losses[end - 10 : end]) / 10 <= target), None)


def _reached(training: StackTraining, target: float) -> int | None:
    """Go on, a batch an update, until the mean of ten losses is at most ``target``; the batch of that."""
    while (end := _batch_of(training.losses, target)) is None and len(training.losses) < LONGEST:
        for number in range(len(training.losses), len(training.losses) + 10):
            training.take(range(number, number + 1))
    return end


@restored_threads()
def measure_speedup_pairs(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Updates of the plain training and of the one with the stack, timed in turns.

    Returns:
        ``pairs``; ``saved``: the share of the plain time that the stack saves, median over the pairs, with
        ``saved_p20`` and ``saved_p80``; ``plain_ms`` and ``stack_ms``, medians.
    """
    config, data, model = _start(config, device)
    plans = [Plan(Execution(threads=torch.get_num_threads())), find_plan(config, data, model)]
    trainings = [
        StackTraining(config, data, copy.deepcopy(model), plan.execution, plan.compress) for plan in plans
    ]
    batches = config.optim.accumulation
    times: list[list[float]] = [[], []]
    options = config.benchmark
    for turn in range(options.warmup + options.repeats):
        for training, own in zip(trainings, times, strict=True):
            if training.execution.threads:
                torch.set_num_threads(training.execution.threads)
            synchronize(device)
            start = time.perf_counter()
            training.take(range(turn * batches, (turn + 1) * batches))
            if turn >= options.warmup:
                own.append(time.perf_counter() - start)
    shares = [1 - stack / plain for plain, stack in zip(*times, strict=True)]
    return {
        "pairs": len(shares),
        "saved": median(shares),
        "saved_p20": quantile(shares, 0.2),
        "saved_p80": quantile(shares, 0.8),
        "plain_ms": median(times[0]) * 1e3,
        "stack_ms": median(times[1]) * 1e3,
    }


@restored_threads()
def measure_speedup_memory(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Peak memory of a step, plainly and with the stack, and what compressed activations cost and save.

    Returns:
        ``plain_mb``; ``stack_mb``, as the stack is used; ``uncompiled``, whether that leaves out a
        compilation that the stack uses, because what compiled code holds cannot be counted on a CPU;
        ``uncompressed_mb`` and ``compressed_mb``, the stack without and with compression, both without
        compilation; ``ratio``, held / float32 size of what was compressed, None where nothing was large
        enough; ``gradient_error``, relative, of one batch; ``time_ratio`` of a batch forward and backward,
        compressed / not (median of turns), both without compilation, too; ``compressed``,
        whether the stack uses it.
    """
    config, data, model = _start(config, device)
    plan = find_plan(config, data, model)
    off = Plan(dataclasses.replace(plan.execution, compile=False))
    peaks = {
        "plain_mb": Plan(Execution(threads=plan.execution.threads)),
        "uncompressed_mb": off,
        "compressed_mb": Plan(off.execution, compress=True),
    }
    measured: dict[str, Any] = {
        name: memory_of_update(config, data, copy.deepcopy(model), other) / MB
        for name, other in peaks.items()
    }
    used = Plan(countable(plan.execution, device), plan.compress)
    if used.execution.compile:
        measured["stack_mb"] = memory_of_update(config, data, copy.deepcopy(model), used) / MB
    else:
        measured["stack_mb"] = measured["compressed_mb" if plan.compress else "uncompressed_mb"]
    trainings = [
        StackTraining(config, data, copy.deepcopy(model), off.execution, compressed)
        for compressed in (False, True)
    ]
    calls = [partial(training.gradients, range(1)) for training in trainings]
    times = times_in_turns(calls, 1, config.benchmark.repeats, device)
    exact, rounded = (
        joined(p.grad for p in training.model.parameters() if p.grad is not None) for training in trainings
    )
    compressor = trainings[1].compressor
    assert compressor is not None
    return measured | {
        "ratio": compressor.ratio,
        "gradient_error": relative_error(rounded, exact),
        "time_ratio": median(b / a for a, b in zip(*times, strict=True)),
        "compressed": plan.compress,
        "uncompiled": used.execution != plan.execution,
        "parameters": count_parameters(model),
    }


def judge(config: BenchConfig, results: Results) -> None:
    """Both settings of the accumulation: the one asked for, and an update from every batch."""
    asked = config.optim.accumulation
    for accumulation in dict.fromkeys((asked, 1)):
        own = changed(config, optim={"accumulation": accumulation})
        _judge_accumulation(own, results, accumulation == asked)
    values, criteria = results.values, results.criteria
    memory = results.measure("speedup memory", "stack", config)
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
    results.at_most("compressed / float32 activations", held, config.stack.ratio)
    if config.benchmark.ablation:
        _ablation(config, results)


def _judge_accumulation(config: BenchConfig, results: Results, asked: bool) -> None:
    """Plain run, run with the stack, and both in turns, for one accumulation."""
    count, label = config.optim.accumulation, _label(config)
    # Random tokens cannot be learned.
    learned = config.data.name != "synthetic"
    # Where an update takes several batches, going on until the loss is reached takes too long.
    goes_on = learned and count == 1
    runs = {}
    for name, stack in (("plain", PLAIN), ("stack", config.stack)):
        print(f"speedup: {name}, {label} ...", flush=True)
        place = str(results.folder / f"{name}-{count}")
        measurement = "speedup until learned" if goes_on and name == "stack" else "speedup"
        own = dataclasses.replace(config, stack=stack, output_root=place)
        runs[name] = results.measure(measurement, f"{name}, {label}", own, shown_as="speedup")
        _place_checkpoint(runs[name], results.folder)
    print(f"speedup: in turns, {label} ...", flush=True)
    pairs = results.measure("speedup pairs", label, config)
    plain, ours = runs["plain"], runs["stack"]
    if asked:
        for decision in ours["decisions"] or []:
            print(f"  {decision['name']}: {decision['why']}")
    less = saved(ours["seconds"], plain["seconds"])
    rates = ratio(ours["tokens_per_second"], plain["tokens_per_second"])
    faster = None if rates is None else rates - 1
    losses = [run[key] for run in runs.values() for key in ("loss", "valid_loss")]
    difference = None if None in losses else max(abs(losses[0] - losses[2]), abs(losses[1] - losses[3]))
    low, high = GRADIENT_RANGE
    smallest, largest = _over(runs, min, "grad_norm_min"), _over(runs, max, "grad_norm_max")
    nan, inf = (_over(runs, sum, key) for key in ("nan_count", "inf_count"))
    not_finite = None if nan is None or inf is None else nan + inf
    loads = all_of([run["checkpoint_loads"] for run in runs.values()])
    found = {
        "speedup_pct": percent(less),
        "speedup_paired_pct": percent(pairs["saved"]),
        "speedup_paired_p20_pct": percent(pairs["saved_p20"]),
        "speedup_paired_p80_pct": percent(pairs["saved_p80"]),
        "throughput_improvement_pct": percent(faster),
        "plain_update_ms": pairs["plain_ms"],
        "stack_update_ms": pairs["stack_ms"],
        "plain_seconds": plain["seconds"],
        "stack_seconds": ours["seconds"],
        "stack_tuning_seconds": ours["tuning_seconds"],
        "stack_compile_seconds": ours["compile_seconds"],
        "plain_loss": plain["loss"],
        "stack_loss": ours["loss"],
        "loss_diff": difference,
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
            results.unjudged[_key("target_step", config, asked)] = (
                f"{last} batches, {label}, do not take the loss to {TARGET_LOSS}, and only the training with "
                "1 batch an update goes on until it is there"
            )
    results.values |= {_key(key, config, asked): value for key, value in found.items()}
    results.at_least(f"time saved, whole run, {label}", less, SAVED_TARGET)
    results.at_least(f"time saved, in turns, {label}", pairs["saved"], SAVED_TARGET)
    results.at_least(f"throughput gained, {label}", faster, TOKENS_TARGET)
    results.at_most(f"final losses apart, {label}", difference, LOSS_DIFFERENCE)
    results.at_most(f"NaN and Inf, {label}", not_finite, 0, "=")
    results.at_least(f"smallest gradient norm, {label}", smallest, low)
    results.at_most(f"largest gradient norm, {label}", largest, high)
    results.criteria.append((f"checkpoints load, {label}", loads, "yes", loads))
    if config.stack.speculation:
        title = f"texts that decode to the tokens of plain greedy decoding, {label}"
        same = f"{ours['decode_texts_equal']} of {ours['decode_texts']}" if ours else None
        results.criteria.append((title, same, "all", ours["decode_equal"]))
    if goes_on:
        reached = step is not None if ours else None
        results.criteria.append((f"batch at which the loss is {TARGET_LOSS}, {label}", step, "any", reached))


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


def _ablation(config: BenchConfig, results: Results) -> None:
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
    runs = {"plain": results.details.get("speedup", {}).get(f"plain, {_label(config)}", Unmeasured())}
    for name, variant in variants.items():
        print(f"ablation: {name} ...", flush=True)
        place = str(results.folder / "ablation" / name.replace(" ", "-"))
        own = dataclasses.replace(config, stack=variant, output_root=place)
        runs[name] = results.run("speedup", own, name)
        _place_checkpoint(runs[name], results.folder)
    results.details["speedup ablation"] = {name: run for name, run in runs.items() if run}
    plain = runs["plain"]["seconds"]
    shares = {name: saved(run["seconds"], plain) for name, run in runs.items()}
    results.values["ablation_saved"] = shares
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
    results.values["ablation_pays"] = pays
    left = results.values["left_off"]
    told = "not measured" if left is None else ", ".join(left) or "nothing"
    print(f"  left off by the stack itself: {told}")


def _label(config: BenchConfig) -> str:
    count = config.optim.accumulation
    return f"{count} batches an update" if count > 1 else "1 batch an update"


def check(config: BenchConfig) -> None:
    """See that the trainings update the parameters at least once.

    Raises:
        ConfigError: there are fewer batches than one update takes.
    """
    needed = config.optim.accumulation
    if config.benchmark.train_steps < needed:
        raise ConfigError(
            f"benchmark.train_steps={config.benchmark.train_steps} is too small for benchmark=speedup; it "
            f"must be at least optim.accumulation={needed}, the batches of one update"
        )


def plot(models: Models) -> Any:
    """The losses of the trainings, and by how much those with the stack differ from the plain ones."""
    curves = {name: values["curve"] for name, values in models.items()}
    plain = {name: name.replace("stack", "plain", 1) for name in curves}
    differences = {
        name: subtracted(curve, curves[plain[name]])
        for name, curve in curves.items()
        if plain[name] in curves and plain[name] != name
    }
    return draw_lines(
        "training loss, plainly and with the stack",
        "batch",
        "loss [nats per token]",
        curves,
        differences=("difference to plain", differences),
    )


def curves(models: Models) -> list[tuple[int, dict[str, float]]]:
    """Losses of the trainings by batch."""
    by_step: dict[int, dict[str, float]] = {}
    for name, values in models.items():
        for step, loss in values["curve"]:
            by_step.setdefault(step, {})[f"loss/{name}"] = loss
    return sorted(by_step.items())


BENCHMARK = Benchmark(
    measure={
        "speedup": measure_speedup_run,
        "speedup until learned": partial(measure_speedup_run, until=TARGET_LOSS),
        "speedup pairs": measure_speedup_pairs,
        "speedup memory": measure_speedup_memory,
    },
    judge=judge,
    plot=plot,
    shown=(
        Metric("plain_seconds", "time of the training [s]", "plain", {"stack_seconds": "stack"}, "plain"),
    ),
    stages=("3a",),
    trained=False,
    workload=lambda config: Workload(16),
    check=check,
    tables=partial(model_tables, "speedup", drawn="seconds"),
    curves=curves,
)
