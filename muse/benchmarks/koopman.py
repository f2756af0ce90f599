"""``benchmark=koopman``: whether the operators of stage 3 are linear, and what a step ahead costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from muse.benchmarks.benchmark import Benchmark, Models, require_part
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.layers.koopman import operators_of
from muse.measure.timing import quantile, times_in_turns
from muse.report.plots import draw_eigenvalues
from muse.report.sweep_plot import Metric

LINEARITY_TARGET = 5e-4
# Steps without input, as a token after another and as one product, and how much faster that must be.
STEPS = 4
SPEEDUP_TARGET = 3.0
# The gate at which eigenvalues are told: about where it begins.
RATE = 0.5


@torch.no_grad()
def measure_koopman(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Let random observables of every operator evolve without input, step by step and at once.

    Returns:
        ``linearity_error``: of n single steps against one product with lambda^n, n the tokens of a window,
        relative to the observables before, the worst of all operators;
        ``speedup``: the median over rounds of the time of 4 single steps / that of one product;
        ``half_lives``: of all operators in tokens, sorted;
        ``eigenvalues``: by operator, (real part, imaginary part) at a gate of 1/2.
    """
    model = benchmark_model(config, device)
    operators = operators_of(model)
    batch, length = batch_shape(config)
    generator = torch.Generator().manual_seed(config.seed)
    errors, half_lives = [], []
    eigenvalues: dict[str, list[tuple[float, float]]] = {}
    for name, operator in operators.items():
        g = torch.randn(batch, 2, operator.observables, generator=generator).to(device)
        steps = g
        for _ in range(length):
            steps = operator.evolve(steps, 1, RATE)
        errors.append(((steps - operator.evolve(g, length, RATE)).norm() / g.norm()).item())
        decay, theta = (x.double() for x in operator.eigenvalues(RATE))
        half_lives += (math.log(0.5) / decay).tolist()
        values = torch.polar(decay.exp(), theta)
        eigenvalues[name] = list(zip(values.real.tolist(), values.imag.tolist(), strict=True))
    first = next(iter(operators.values()))
    g = torch.randn(batch, 2, first.observables, generator=generator).to(device)

    def singly() -> Tensor:
        state = g
        for _ in range(STEPS):
            state = first.evolve(state, 1, RATE)
        return state

    def at_once() -> Tensor:
        return first.evolve(g, STEPS, RATE)

    options = config.benchmark
    rounds = zip(*times_in_turns((singly, at_once), options.warmup, options.repeats, device), strict=True)
    return {
        "linearity_error": max(errors),
        "speedup": quantile([slow / fast for slow, fast in rounds], 0.5),
        "half_lives": sorted(half_lives),
        "eigenvalues": eigenvalues,
    }


def judge(config: BenchConfig, results: Results) -> None:
    """The operators' linearity, and the gain of many steps at once; nothing without operators."""
    if config.stage.koopman == "none":
        return
    measured = results.measure("koopman", name_of(config), config)
    error, speedup = measured["linearity_error"], measured["speedup"]
    ahead = f"{STEPS} steps ahead, one by one / at once"
    results.values |= {
        "koopman_linearity_error": error,
        "koopman_linearity_pass": results.at_most(
            "linearity error of the operators", error, LINEARITY_TARGET
        ),
        "koopman_speedup": speedup,
        "koopman_speedup_pass": results.at_least(ahead, speedup, SPEEDUP_TARGET),
    }


def plot(models: Models) -> Any:
    """The eigenvalues beside the unit circle."""
    operators = {name: points for values in models.values() for name, points in values["eigenvalues"].items()}
    return draw_eigenvalues(f"eigenvalues at a gate of {RATE:g}", operators)


BENCHMARK = Benchmark(
    measure={"koopman": measure_koopman},
    judge=judge,
    plot=plot,
    shown=(Metric("koopman_linearity_error", "linearity error"),),
    stages=("3",),
    check=require_part,
)
