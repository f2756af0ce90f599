"""``benchmark=vram``: peak memory of a training step, by what holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.criteria import all_of, percent, ratio, saved
from muse.benchmarks.model import benchmark_model, random_training_step
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.workload import batch_shape, beside_backpropagation, flow_of
from muse.config import BenchConfig
from muse.dynamics import flow_metrics
from muse.measure.gradient_error import full_precision
from muse.measure.peak_memory import GB, peak_memory
from muse.models import count_parameters
from muse.options import changed
from muse.report.plots import draw_stacked
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import ResultTable, model_tables

HOLDERS = ("parameters", "optimiser", "activations", "gradients and temporaries")
# Of stage 0 in fp32; in GB and against full backpropagation; and the error of what exact rebuilds.
DECODER_TARGET = 0.52
FLOW_GB = 7.5
FLOW_REDUCTION = 0.7
RECONSTRUCTION_TARGETS = {"2": ("<", 8e-6), "3": ("=", 0.0)}
# Of stage 3: GB of a step whose tokens are one window, and how far a reversible trunk is below the same.
WINDOW_GB = 7.8
TRUNK_REDUCTION = 0.85


@full_precision()
def measure_memory(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Peak memory of the second training step, in GB (10^9 bytes).

    The first step, which creates the optimiser's state, is not measured.

    Returns:
        ``peak``, and what it is made of: ``parameters``, ``optimiser``, ``activations`` (kept by the
        forward pass up to the loss) and ``gradients and temporaries`` (the rest at the peak);
        ``gradients`` is the size of all gradients, which are not all alive at the peak.

    Raises:
        NotFinite: the loss of a step is not; its memory would mean nothing.
    """
    model = benchmark_model(config, device)
    step, take = random_training_step(config, model, device)
    errors = [take().reconstruction_error]
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    step.optimizer.attach_gradients()
    state = step.optimizer.state_tensors()
    loss_of = model.loss_of
    after_forward = 0
    with peak_memory(device, model, state) as meter:

        def noting(features: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
            nonlocal after_forward
            after_forward = meter.current()
            return loss_of(features, targets, reduction)

        model.loss_of = noting  # type: ignore[method-assign]
        errors.append(take().reconstruction_error)
        peak = meter.peak()
    parameters = _bytes(list(model.parameters()))
    optimiser = _bytes(state)
    activations = after_forward - meter.before
    return {
        "peak": peak / GB,
        "parameters": parameters / GB,
        "optimiser": optimiser / GB,
        "activations": activations / GB,
        "gradients and temporaries": (peak - parameters - optimiser - activations) / GB,
        "gradients": gradients / GB,
        "parameter_count": count_parameters(model),
        **flow_of(config),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **flow_metrics(model, errors),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def judge(config: BenchConfig, results: Results) -> None:
    """Peak memory beside stage 0, and of stages 2 and 3 beside full backpropagation."""
    (_judge_flow if config.stage.flowing else _judge_decoder)(config, results)


def _judge_decoder(config: BenchConfig, results: Results) -> None:
    """Peak memory of a training step beside stage 0 in its own precision and in bf16."""
    values = results.values
    peak = results.measure("vram", name_of(config), config)["peak"]
    values["vram_gb"] = peak
    if config.stage.number == "0":
        values |= {"vram_ratio": None, "vram_pass": None}
        return
    baseline = baseline_of(config, results.stage_of("0"))
    full = results.measure("vram", name_of(baseline), baseline)["peak"]
    half = baseline_of(config, results.stage_of("0"), "bf16")
    half_peak = results.measure("vram", name_of(half), half)["peak"]
    share = ratio(peak, full)
    values |= {
        "vram_ratio": share,
        "vram_pass": results.at_most("peak memory / stage 0 in fp32", share, DECODER_TARGET),
        "vram_baseline_gb": full,
        "vram_baseline_bf16_gb": half_peak,
        "vram_ratio_bf16": ratio(peak, half_peak),
    }


def _judge_flow(config: BenchConfig, results: Results) -> None:
    """Peak memory by gradient mode, and what ``exact`` rebuilds."""
    found: dict[str, dict[str, Any]] = {}
    for gradient in ("exact", "reversible", "checkpoint", "backprop"):
        own = changed(config, stage={"gradient": gradient})
        if gradient == "backprop":
            # Full backpropagation keeps what the blocks keep, too.
            own = changed(own, stage={"trunk": "residual", "recompute": "none"})
        found[gradient] = results.measure("vram", gradient, own)
    verified = changed(config, stage={"gradient": "exact", "verify": True})
    rebuilt = results.measure("vram", "exact, verified", verified)
    peaks = {gradient: measured["peak"] for gradient, measured in found.items()}
    reduction = saved(peaks["exact"], peaks["backprop"])
    missed = rebuilt.get("flow/reconstruction_error")
    counts = [measured["flow/fallbacks"] for measured in (found["exact"], rebuilt)]
    fallbacks = None if None in counts else int(max(counts))
    if rebuilt and missed is None:
        results.unjudged["reconstruction_error"] = "every flow fell back to checkpointing and rebuilt nothing"
    values = results.values
    small = results.at_most("peak memory, exact [GB]", peaks["exact"], FLOW_GB, "<")
    less = results.at_least("less than full backpropagation", reduction, FLOW_REDUCTION)
    sign, target = RECONSTRUCTION_TARGETS[config.stage.number]
    rebuilt_to_it = results.at_most("reconstruction error", missed, target, sign)
    results.at_most("fallbacks", fallbacks, 0, "=")
    values |= {
        "vram_symplectic_gb": peaks["exact"],
        "vram_full_backprop_gb": peaks["backprop"],
        "vram_reversible_gb": peaks["reversible"],
        "vram_checkpoint_gb": peaks["checkpoint"],
        "vram_activations_gb": found["exact"]["activations"],
        "vram_reduction_ratio": reduction,
        "vram_reduction_pct": percent(reduction),
        "vram_pass": all_of([small, less]),
        "reconstruction_error": missed,
        "reconstruction_pass": rebuilt_to_it,
        "reconstruction_error_reversible": found["reversible"].get("flow/reconstruction_error"),
        "fallback_count": fallbacks,
    }
    if config.stage.number == "3":
        _judge_integrated(config, peaks, results)


def _judge_integrated(config: BenchConfig, peaks: Mapping[str, float | None], results: Results) -> None:
    """Peak memory of stage 3 where all tokens are one window, and with a reversible trunk."""
    tokens = math.prod(batch_shape(config))
    window = changed(config, benchmark={"batch_size": 1, "seq_len": tokens})
    peak = results.measure("vram", f"1 x {tokens}", window)["peak"]
    trunk = None
    if config.stage.trunk == "reversible":
        trunk = peaks["exact"]
    elif config.stage.loops > 1:
        reason = f"stage.loops={config.stage.loops} has no reversible trunk"
        results.leave_open(reason, "vram_reversible_trunk_reduction")
    else:
        options = {"gradient": "exact", "trunk": "reversible", "recompute": "none"}
        trunk = results.measure("vram", "exact, reversible trunk", changed(config, stage=options))["peak"]
    reduction = saved(trunk, peaks["backprop"])
    results.values |= {
        "vram_gb": peak,
        "vram_gb_pass": results.at_most(f"peak memory of 1 x {tokens} tokens [GB]", peak, WINDOW_GB, "<"),
        "vram_reversible_trunk_gb": trunk,
        "vram_reversible_trunk_reduction": reduction,
        "vram_reversible_trunk_pass": results.at_least(
            "less than full backpropagation, reversible trunk", reduction, TRUNK_REDUCTION
        ),
    }


def plot(models: Models) -> Any:
    """What holds the peak of each model, and the most that is allowed."""
    bars = {name: {part: values[part] for part in HOLDERS} for name, values in models.items()}
    limit = None
    if full := models.get("backprop"):
        allowed = 1 - FLOW_REDUCTION
        limit = (f"{allowed:.0%} of full backpropagation", allowed * full["peak"])
    elif baseline := models.get("stage 0 fp32"):
        limit = (f"{DECODER_TARGET:.0%} of stage 0 fp32", DECODER_TARGET * baseline["peak"])
    return draw_stacked("peak memory of a training step", "GB", bars, limit)


def tables(models: Models) -> list[ResultTable]:
    """The models, and what holds the memory of each at its peak, in GB."""
    rows = [
        [f"{name}, {holder}", name, holder, values[holder]]
        for name, values in models.items()
        for holder in HOLDERS
        if holder in values
    ]
    held = ResultTable("memory", ("part", "model", "holder", "GB"), rows, bar=("part", "GB"))
    return [*model_tables("vram", models, drawn="peak"), held]


BENCHMARK = Benchmark(
    measure={"vram": measure_memory},
    judge=judge,
    plot=plot,
    shown=(
        Metric(
            "vram_gb",
            "peak memory [GB]",
            "",
            {"vram_baseline_gb": "stage 0"},
            "stage 0",
            key_of_flow="vram_symplectic_gb",
        ),
        Metric(
            "vram_symplectic_gb",
            "peak memory [GB]",
            "exact",
            {
                "vram_reversible_gb": "reversible",
                "vram_checkpoint_gb": "checkpoint",
                "vram_full_backprop_gb": "backprop",
            },
            "backprop",
        ),
    ),
    workload=beside_backpropagation,
    tables=tables,
)
