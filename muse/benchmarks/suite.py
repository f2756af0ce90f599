"""Every benchmark by its name, and what becomes of the options that choose one or all of a stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from muse.benchmarks import (
    ablation,
    adjoint,
    deployment,
    dialectic,
    energy,
    gradients,
    kernels,
    koopman,
    mera,
    perplexity,
    price,
    selection,
    serving,
    speedup,
    stability,
    throughput,
    vram,
)
from muse.benchmarks.baseline import check_baseline
from muse.benchmarks.benchmark import Benchmark, Measure
from muse.benchmarks.results import Results
from muse.benchmarks.workload import check_flow, settle
from muse.config import FLOWING, BenchConfig, StageConfig
from muse.errors import ConfigError, RunError
from muse.files import finite
from muse.hardware import describe, use_hardware
from muse.processes.isolated import run_isolated

# Of what the cells of a sweep measured, it draws what the first of these shows.
BENCHMARKS: dict[str, Benchmark] = {
    "vram": vram.BENCHMARK,
    "throughput": throughput.BENCHMARK,
    "perplexity": perplexity.BENCHMARK,
    "speedup": speedup.BENCHMARK,
    "energy": energy.BENCHMARK,
    "gradients": gradients.BENCHMARK,
    "stability": stability.BENCHMARK,
    "kernels": kernels.BENCHMARK,
    "koopman": koopman.BENCHMARK,
    "mera": mera.BENCHMARK,
    "dialectic": dialectic.BENCHMARK,
    "selection": selection.BENCHMARK,
    "adjoint": adjoint.BENCHMARK,
    "price": price.BENCHMARK,
    "ablation": ablation.BENCHMARK,
    "serving": serving.BENCHMARK,
    "deployment": deployment.BENCHMARK,
}
# What benchmark=all runs, in this order, where it goes with the stage.
ALL = (
    "vram",
    "throughput",
    "stability",
    "gradients",
    "energy",
    "koopman",
    "mera",
    "dialectic",
    "selection",
    "perplexity",
    "speedup",
)
MEASUREMENTS: dict[str, Measure] = {
    name: measure for benchmark in BENCHMARKS.values() for name, measure in benchmark.measure.items()
}


def chosen(config: BenchConfig) -> dict[str, Benchmark]:
    """The benchmarks that ``benchmark=`` means."""
    names = ALL if config.benchmark.name == "all" else (config.benchmark.name,)
    return {name: BENCHMARKS[name] for name in names if config.stage.number in BENCHMARKS[name].stages}


def settled(config: BenchConfig, name: str) -> BenchConfig:
    """``config`` with what it leaves open as a benchmark has it."""
    return settle(config, BENCHMARKS[name].workload(config))


def check_benchmark(config: BenchConfig, given: Collection[str]) -> None:
    """See that the options go together, and that each changes something.

    Args:
        config: with the options of the checkpoint.
        given: names of the options that the command gives.

    Raises:
        ConfigError: it is not so; says what to change.
    """
    options, number = config.benchmark, config.stage.number
    if (
        (options.seq_len or 0) > config.model.seq_len
        and config.stage.mixer == "none"
        and options.name != "kernels"
    ):
        raise ConfigError(
            f"benchmark.seq_len={options.seq_len} is longer than the learned positions of "
            f"stage.mixer=none; it must be at most model.seq_len={config.model.seq_len}"
        )
    benchmarks = chosen(config)
    if not benchmarks:
        if (stages := BENCHMARKS[options.name].stages) in (FLOWING, ("2",)):
            raise ConfigError(
                f"benchmark={options.name} is about the flow; it needs stage={' or '.join(stages)}"
            )
        if stages == ("3",):
            raise ConfigError(f"benchmark={options.name} is about what stage 3 adds; it needs stage=3")
        raise ConfigError(
            f"benchmark={options.name} does not go with stage={number}; stage=3a has "
            "benchmark=speedup, which only stage=3a has, benchmark=deployment and benchmark=serving"
        )
    if options.checkpoint is not None and not any(one.trained for one in benchmarks.values()):
        raise ConfigError(
            f"benchmark.checkpoint changes nothing in benchmark={options.name} of "
            f"stage={number}, which does not measure trained weights; leave it out"
        )
    for name, benchmark in benchmarks.items():
        check_flow(config, given, name, benchmark.workload(config))
    for benchmark in benchmarks.values():
        benchmark.check(config)
    check_baseline(config)


def run_suite(config: BenchConfig, folder: Path, stage_of: Callable[[str], StageConfig]) -> Results:
    """Run the chosen benchmark; ``all`` runs every one, and one that fails does not stop the others.

    The keys of one that failed are None, ``failures`` says why, and ``all_pass`` is None as long as one
    criterion is.

    Args:
        config: what is measured.
        folder: of the run; checkpoints go below it.
        stage_of: composes the options of another stage, a baseline's, from its number.
    """
    results = Results(folder, measure_isolated, stage_of)
    for name, benchmark in chosen(config).items():
        print(f"{name} ...", flush=True)
        benchmark.judge(settled(config, name), results)
    results.judge()
    if any(benchmark.strict for benchmark in chosen(config).values()):
        # After that: all_pass is false, and not open.
        results.failures |= {
            title: str(seen) for title, seen, _, passed in results.criteria if passed is False
        }
    return results


def measure_isolated(measurement: str, *configs: BenchConfig) -> dict[str, Any]:
    """Run a measurement in a process of its own and return what it measured, as JSON has it.

    Peak memory, the allocator's caches and a CUDA context outlive a measurement in its process.

    Raises:
        RunError: when the process fails or is killed, e.g. for lack of memory.
    """
    try:
        return run_isolated(_measured, measurement, *configs)
    except ConfigError as error:
        # The others may go with the options.
        raise RunError(str(error)) from error


def _measured(measurement: str, *configs: BenchConfig) -> dict[str, Any]:
    device = use_hardware(configs[0].hardware)
    try:
        values = MEASUREMENTS[measurement](*configs, device)
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of GPU memory: {str(error).splitlines()[0]}") from error
    precision = {"matmul_precision": torch.get_float32_matmul_precision()}
    told = finite({**precision, **values, "device": describe(device)})
    return dict(json.loads(json.dumps(told)))
