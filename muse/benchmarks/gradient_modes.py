"""The four gradient modes of a flow: are they right, and what does a training step take with each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from muse.benchmarks.model import benchmark_model, random_tokens, random_training_step
from muse.benchmarks.workload import batch_shape, flow_of
from muse.config import GRADIENTS, BenchConfig
from muse.dynamics import flow_metrics, flows_of
from muse.measure.gradient_error import ALLOWED, full_precision, joined, relative_error
from muse.measure.timing import quantile, seconds_of
from muse.models import LanguageModel, build_model
from muse.options import changed

# Tokens of the batch that gradients are compared on.
CHECKED_TOKENS = 64


@full_precision()
def measure_modes(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Time whole training steps of a model by each ``stage.gradient``, in turns.

    Before that the gradients of all parameters in float32 are held against plain autograd in float64. Where
    the forces take half-precision products, float64 tells the error of rounding, not that of a mode: a mode
    is then right if its error is at most twice that of ``backprop``, which rounds the same products.

    Returns:
        ``matmul_precision``, torch's word for that of float32 products, here always the highest;
        ``gradient_error_<mode>``, ``gradient_error_allowed`` and ``gradients_correct``; and where they are,
        otherwise None:

        - ``step_ms_p50_<mode>``, ``step_ms_p20_exact`` and ``step_ms_p80_exact``;
        - ``ratio_<mode>_to_backprop``: median over rounds of the ratio of times;
        - ``tokens_per_second`` of ``exact`` at the median step;
        - ``fallbacks_<mode>``: flows that went on with checkpointing in a step; the times of such a mode
          are None.

    Raises:
        NotFinite: the loss of a step is not.
    """
    errors = gradient_errors(config, device)
    allowed = ALLOWED if config.stage.force_precision == "fp32" else 2 * errors["backprop"]
    correct = math.isfinite(allowed) and all(error <= allowed for error in errors.values())
    times, fallbacks = _step_seconds(config, device) if correct else ({}, {})
    return {
        **flow_of(config),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **{f"gradient_error_{mode}": error for mode, error in errors.items()},
        "gradient_error_allowed": allowed,
        "gradients_correct": correct,
        **_speeds(times, fallbacks, math.prod(batch_shape(config))),
    }


@full_precision()
def gradient_errors(config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Relative error of the gradient of all parameters by each mode, in float32 against float64."""
    length = min(batch_shape(config)[1], CHECKED_TOKENS)
    # The same map every time.
    of_stage = {"precision": "fp32", "dropout": 0.0}
    small = changed(config, benchmark={"batch_size": 1, "seq_len": length}, stage=of_stage)
    exact = _gradient(small, "backprop", device, torch.float64)
    return {mode: relative_error(_gradient(small, mode, device, torch.float32), exact) for mode in GRADIENTS}


def _gradient(config: BenchConfig, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    stage = dataclasses.replace(config.stage, gradient=mode)
    model = build_model(stage, config.model, config.model.vocab_size, config.seed).to(device, dtype)
    model.loss(*random_tokens(config, device)).backward()
    return joined(p.grad for p in model.parameters() if p.grad is not None)


def _step_seconds(config: BenchConfig, device: torch.device) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a step in every timed round, and the layers that fell back, by mode.

    One model takes the steps of all modes: four would not fit where one does, and might differ in more.
    """
    untrained = changed(config, benchmark={"checkpoint": None})
    model = benchmark_model(untrained, device)
    _, step = random_training_step(untrained, model, device)
    times: dict[str, list[float]] = {mode: [] for mode in GRADIENTS}
    fallbacks = dict.fromkeys(GRADIENTS, 0)
    for number in range(config.benchmark.warmup + config.benchmark.repeats):
        for mode in GRADIENTS:
            _use(model, mode, config.stage.fraction_bits)
            seconds = seconds_of(step, device)
            fallbacks[mode] = max(fallbacks[mode], round(flow_metrics(model)["flow/fallbacks"]))
            if number >= config.benchmark.warmup:
                times[mode].append(seconds)
    return times, fallbacks


def _use(model: LanguageModel, mode: str, fraction_bits: int) -> None:
    """Let every flow go on in this mode, as if it had never fallen back."""
    for flow in flows_of(model):
        flow.gradient, flow.scale = mode, 2.0**fraction_bits if mode == "exact" else 0.0
        flow.fallen_back = False
        flow.fallback_count.zero_()


def _speeds(times: dict[str, list[float]], fallbacks: dict[str, int], tokens: int) -> dict[str, float | None]:
    # The time of a mode that fell back is that of another one.
    own = {mode: seconds for mode, seconds in times.items() if not fallbacks[mode]}

    def milliseconds(mode: str, fraction: float) -> float | None:
        return 1e3 * quantile(own[mode], fraction) if mode in own else None

    def ratio(mode: str) -> float | None:
        if mode not in own:
            return None
        return quantile([ours / full for ours, full in zip(own[mode], own["backprop"], strict=True)], 0.5)

    return {
        **{f"step_ms_p50_{mode}": milliseconds(mode, 0.5) for mode in GRADIENTS},
        "step_ms_p20_exact": milliseconds("exact", 0.2),
        "step_ms_p80_exact": milliseconds("exact", 0.8),
        **{f"ratio_{mode}_to_backprop": ratio(mode) for mode in GRADIENTS if mode != "backprop"},
        "tokens_per_second": tokens / quantile(own["exact"], 0.5) if "exact" in own else None,
        **{f"fallbacks_{mode}": fallbacks.get(mode) for mode in GRADIENTS if mode != "backprop"},
    }
