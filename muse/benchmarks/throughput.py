"""Speed of a training step, beside the time of its matrix products alone."""

from __future__ import annotations

import math

import torch

from muse.benchmarks.model import benchmark_model, training_step
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder, replayed
from muse.measure.operations import InsideOperations
from muse.measure.timing import quantile, times_in_turns


def measure_throughput(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Time training steps and, in turns with them, their matrix products as bare torch calls.

    Returns:
        ``tokens_per_second`` at the median step; ``step_ms_p20``, ``_p50`` and ``_p80``;
        ``products_ms``, the median time of the products, those inside attention as bare products;
        ``products_ratio``, the median over rounds of step time / products time;
        ``products_and_sdpa_ratio``, the same with bare SDPA calls in place of the products inside attention;
        ``product_tflops``, the products' arithmetic rate.

    Raises:
        NotFinite: the loss of a step is not, so that no speed of a broken step is reported.
    """
    model = benchmark_model(config, device)
    _, step = training_step(config, model, device)
    step()
    with ProductRecorder() as recorder, InsideOperations(closed=COMPLEX_ATTENTION):
        step()
    outside = replayed(recorder.products, device)
    inside = replayed(recorder.attention_products, device)
    calls = [(call.function(device), count) for call, count in recorder.attention_calls.items()]

    def attention() -> None:
        for call, count in calls:
            for _ in range(count):
                call()

    options = config.benchmark
    functions = (step, outside, inside, attention)
    rounds = list(zip(*times_in_turns(functions, options.warmup, options.repeats, device), strict=True))
    steps = [times[0] for times in rounds]
    bare = [times[1] + times[2] for times in rounds]
    products = recorder.products + recorder.attention_products
    flops = sum(product.flops() * count for product, count in products.items())
    tokens = math.prod(batch_shape(config))
    return {
        "tokens_per_second": tokens / quantile(steps, 0.5),
        "step_ms_p20": 1e3 * quantile(steps, 0.2),
        "step_ms_p50": 1e3 * quantile(steps, 0.5),
        "step_ms_p80": 1e3 * quantile(steps, 0.8),
        "products_ms": 1e3 * quantile(bare, 0.5),
        "products_ratio": quantile([s / b for s, b in zip(steps, bare, strict=True)], 0.5),
        "products_and_sdpa_ratio": quantile([s / (o + a) for s, o, _, a in rounds], 0.5),
        "product_tflops": flops / quantile(bare, 0.5) / 1e12,
    }
