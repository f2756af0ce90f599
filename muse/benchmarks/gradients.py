"""``benchmark=gradients``: whether the gradients of all parameters have sane sizes."""

from __future__ import annotations

from typing import Any

import torch

from muse.benchmarks.benchmark import Benchmark
from muse.benchmarks.criteria import GRADIENT_RANGE
from muse.benchmarks.model import benchmark_model, random_tokens
from muse.benchmarks.results import Results, name_of
from muse.config import BenchConfig
from muse.hardware import autocast_dtype
from muse.report.sweep_plot import Metric


def measure_gradients(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Smallest and largest gradient norm of a parameter after one backward pass on random tokens.

    Of an antithesis that has not learned yet only the read-out has a gradient, as its zeros let nothing
    through to what is before it; ``left_out`` names that.
    """
    model = benchmark_model(config, device).train()
    inputs, targets = random_tokens(config, device, config.seed)
    cast = autocast_dtype(config.stage.precision)
    with torch.autocast(device.type, cast, enabled=cast is not None):
        loss = model.loss(inputs, targets)
    loss.backward()
    norms = {
        name: 0.0 if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.float32).item()
        for name, p in model.named_parameters()
    }
    unreached = set() if model.antithesis is None else set(model.antithesis.unreached())
    left_out = [name for name, p in model.named_parameters() if p in unreached]
    for name in left_out:
        del norms[name]
    smallest, largest = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    return {
        "grad_norm_min": norms[smallest],
        "grad_norm_max": norms[largest],
        "grad_norm_min_parameter": smallest,
        "grad_norm_max_parameter": largest,
        "left_out": left_out,
    }


def judge(config: BenchConfig, results: Results) -> None:
    """Sizes of the parameters' gradients."""
    measured = results.measure("gradients", name_of(config), config)
    smallest, largest = measured["grad_norm_min"], measured["grad_norm_max"]
    low, high = GRADIENT_RANGE
    # A norm that is not finite arrives as None, because JSON has no NaN, and fails.
    in_range = smallest is not None and largest is not None and low <= smallest and largest <= high
    passed = in_range if measured else None
    results.values |= {"grad_norm_min": smallest, "grad_norm_max": largest, "gradient_pass": passed}
    results.criteria.append(("smallest gradient norm", smallest, f">= {low:g}", passed))
    results.criteria.append(("largest gradient norm", largest, f"<= {high:g}", passed))


BENCHMARK = Benchmark(
    measure={"gradients": measure_gradients},
    judge=judge,
    shown=(Metric("grad_norm_max", "largest gradient norm"),),
)
