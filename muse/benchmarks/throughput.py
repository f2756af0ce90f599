"""``benchmark=throughput``: speed of a step beside its matrix products, of stage 2 by gradient mode."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.criteria import ratio
from muse.benchmarks.gradient_modes import measure_modes
from muse.benchmarks.model import benchmark_model, random_training_step
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.workload import batch_shape, beside_backpropagation
from muse.config import GRADIENTS, STAGE_3_PARTS, BenchConfig
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder, replayed
from muse.measure.operations import InsideOperations
from muse.measure.timing import quantile, times_in_turns
from muse.options import changed
from muse.report.plots import draw_stacked
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import model_tables

# Time of a step, exact / full backpropagation.
TIME_TARGET = 1.6
# Of stage 2, by stage 3.
SPEED_TARGET = 0.85


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
    _, step = random_training_step(config, model, device)
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


def judge(config: BenchConfig, results: Results) -> None:
    """Speed beside stage 0, and of stage 2 beside full backpropagation."""
    (_judge_flow if config.stage.flowing else _judge_decoder)(config, results)


def _judge_decoder(config: BenchConfig, results: Results) -> None:
    """Speed of a training step beside its matrix products and stage 0; nothing is judged."""
    measured = results.measure("throughput", name_of(config), config)
    results.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "products_ratio": measured["products_ratio"],
        "products_and_sdpa_ratio": measured["products_and_sdpa_ratio"],
    }
    if config.stage.number != "0":
        baseline = baseline_of(config, results.stage_of("0"))
        other = results.measure("throughput", name_of(baseline), baseline)
        results.values["tokens_per_second_ratio"] = ratio(
            measured["tokens_per_second"], other["tokens_per_second"]
        )


def _judge_flow(config: BenchConfig, results: Results) -> None:
    """Gradients and times of a step by gradient mode."""
    measured = results.measure("modes", name_of(config), config)
    share, correct = measured["ratio_exact_to_backprop"], measured["gradients_correct"]
    if correct is False:
        results.unjudged["step_ratio_backprop"] = "the time of a wrong gradient means nothing"
    elif measured["fallbacks_exact"]:
        results.unjudged["step_ratio_backprop"] = (
            f"{measured['fallbacks_exact']} flows of exact went on with checkpointing, whose time it would be"
        )
    errors = [measured[f"gradient_error_{mode}"] for mode in GRADIENTS]
    # An error that is not finite arrives as None.
    worst = None if None in errors else max(errors)
    allowed = measured["gradient_error_allowed"]
    target = "finite" if allowed is None else f"<= {allowed:.2g}"
    results.criteria.append(("gradient error of the worst mode", worst, target, correct))
    results.values |= {
        "tokens_per_second": measured["tokens_per_second"],
        "step_ratio_backprop": share,
        "step_ratio_checkpoint": ratio(share, measured["ratio_checkpoint_to_backprop"]),
        "gradient_error": measured["gradient_error_exact"],
        "gradients_correct": correct,
    }
    if config.stage.number == "3":
        _add_share_of_attention(config, results)
    results.at_most("time of a step, exact / full backpropagation", share, TIME_TARGET)


def _add_share_of_attention(config: BenchConfig, results: Results) -> None:
    """Speed beside that of the same model whose blocks all have attention, stage 2."""
    other = changed(config, stage={"number": "2", **STAGE_3_PARTS})
    rates = [results.measure("throughput", name_of(one), one)["tokens_per_second"] for one in (config, other)]
    share = ratio(*rates)
    results.values |= {
        "throughput": rates[0],
        "phase2_throughput": rates[1],
        "throughput_ratio": share,
        "throughput_pass": results.at_least("tokens per second / stage 2", share, SPEED_TARGET),
    }


def plot(models: Models) -> Any:
    """The time of a step that its matrix products take, and the rest."""
    bars = {
        name: {
            "matrix products": values["products_ms"],
            "everything else": max(0.0, values["step_ms_p50"] - values["products_ms"]),
        }
        for name, values in models.items()
    }
    return draw_stacked("time of a training step", "ms", bars)


BENCHMARK = Benchmark(
    measure={"throughput": measure_throughput, "modes": measure_modes},
    judge=judge,
    plot=plot,
    shown=(Metric("tokens_per_second", "tokens per second"),),
    workload=beside_backpropagation,
    tables=partial(model_tables, "throughput", drawn="tokens_per_second"),
)
