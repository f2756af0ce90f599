"""``benchmark=koopman``: whether the operators of stage 3 are linear, and what a step ahead costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from muse.benchmarks.benchmark import Benchmark, Models, measure_part, require_part
from muse.benchmarks.model import benchmark_model, random_tokens
from muse.benchmarks.results import Results
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.hardware import autocast_dtype
from muse.layers.koopman import KoopmanState, operators_of
from muse.measure.timing import quantile, times_in_turns
from muse.models import LanguageModel
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
        ``state_bytes``: what decoding keeps in all operators of a text of one token; ``state_growth``: by how
        many bytes that changes with the tokens after it;
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
        **_state_sizes(config, model.eval(), device),
        "eigenvalues": eigenvalues,
    }


def _state_sizes(config: BenchConfig, model: LanguageModel, device: torch.device) -> dict[str, int]:
    """Of the operators' states after a token, after a window at once, and after one more token."""
    tokens, _ = random_tokens(config, device, config.seed)
    caches = model.new_caches(tokens.shape[1])
    assert caches is not None
    cast = autocast_dtype(config.stage.precision)
    sizes = []
    for piece in (tokens[:, :1], tokens[:, 1:], tokens[:, :1]):
        if piece.shape[1]:
            with torch.autocast(device.type, cast, enabled=cast is not None):
                model.continue_logits(piece, caches)
        sizes.append(sum(_kept_bytes(cache) for cache in caches))
    return {"state_bytes": sizes[0], "state_growth": max(sizes) - min(sizes)}


def _kept_bytes(cache: Any) -> int:
    """What the states of operators in a cache keep alive."""
    if not isinstance(cache, KoopmanState):
        return sum(map(_kept_bytes, getattr(cache, "parts", ())))
    values = (getattr(cache, field.name) for field in dataclasses.fields(cache))
    # Of a view that is all it looks at a part of.
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, Tensor))


def judge(config: BenchConfig, results: Results) -> None:
    """The operators' linearity, the gain of many steps at once, and whether their states grow in decoding."""
    keys = ("koopman_linearity_error", "koopman_speedup", "koopman_state_growth")
    measured = measure_part(config, results, "koopman", *keys)
    error, speedup, growth = (measured[key] for key in ("linearity_error", "speedup", "state_growth"))
    ahead = f"{STEPS} steps ahead, one by one / at once"
    results.values |= {
        "koopman_linearity_error": error,
        "koopman_linearity_pass": results.at_most(
            "linearity error of the operators", error, LINEARITY_TARGET
        ),
        "koopman_speedup": speedup,
        "koopman_speedup_pass": results.at_least(ahead, speedup, SPEEDUP_TARGET),
        "koopman_state_bytes": measured["state_bytes"],
        "koopman_state_growth": growth,
        "koopman_state_pass": results.at_most(
            "bytes by which the operators' states grow in decoding", growth, 0, "="
        ),
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
