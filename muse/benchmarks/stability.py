"""``benchmark=stability``: whether outputs are finite."""

from __future__ import annotations

import torch

from muse.benchmarks.benchmark import Benchmark
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.hardware import autocast_dtype
from muse.report.sweep_plot import Metric


@torch.no_grad()
def measure_stability(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Count NaN and Inf in the logits of ``benchmark.inputs`` random inputs of random lengths."""
    model = benchmark_model(config, device).eval()
    cast = autocast_dtype(config.stage.precision)
    generator = torch.Generator().manual_seed(config.seed)
    _, longest = batch_shape(config)
    nan = inf = 0
    for _ in range(config.benchmark.inputs):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        tokens = torch.randint(config.model.vocab_size, (1, length), generator=generator).to(device)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            logits = model(tokens)
        nan += int(logits.isnan().sum())
        inf += int(logits.isinf().sum())
    return {"inputs": config.benchmark.inputs, "nan_count": nan, "inf_count": inf}


def judge(config: BenchConfig, results: Results) -> None:
    """NaN and Inf in the logits of random inputs."""
    measured = results.measure("stability", name_of(config), config)
    counts = measured["nan_count"], measured["inf_count"]
    count = None if None in counts else sum(counts)
    results.values |= {
        "nan_count": measured["nan_count"],
        "inf_count": measured["inf_count"],
        "stability_pass": results.at_most(
            f"NaN and Inf in {config.benchmark.inputs} random inputs", count, 0, "="
        ),
    }


BENCHMARK = Benchmark(
    measure={"stability": measure_stability},
    judge=judge,
    shown=(Metric("nan_count", "NaN in the logits"),),
)
