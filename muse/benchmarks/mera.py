"""``benchmark=mera``: what the routers of stage 3 cost over the length of a text, beside attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muse.benchmarks.benchmark import Benchmark, Models, measure_part, require_part
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.results import Results
from muse.benchmarks.workload import Workload, batch_shape
from muse.config import BenchConfig
from muse.hardware import autocast_dtype
from muse.layers import ComplexAttention
from muse.layers.mera import routers_of
from muse.measure.timing import quantile, times_in_turns
from muse.report.plots import draw_lines
from muse.report.sweep_plot import Metric

# Milliseconds of a window, and times that of half of it.
TIME_TARGET = 50.0
RATIO_TARGET = 2.1
# Parts of a window that are timed, too, the criterion's half first.
PARTS = (2, 4, 8)


@torch.no_grad()
def measure_mera(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """See that the first router is causal, then time it, and an attention of its width, on random states.

    Returns:
        ``causal``: whether no bit before a token changed with all from that one on, for tokens all over a
        window of every router; ``time_ms``: the median of a window, without gradients; ``time_ratio``: the
        median over rounds of that time / the time of half a window; both None where it is not causal;
        ``attention_time_ms``: the median of an attention; ``times`` and ``attention_times``: (tokens, ms) of
        an eighth of a window and more.
    """
    model = benchmark_model(config, device).eval()
    routers = list(routers_of(model).values())
    batch, length = batch_shape(config)
    width = config.model.complex
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(config.seed)
    z, other = (
        torch.randn(batch, length, 2, width.d_model, generator=generator).to(device, dtype) for _ in range(2)
    )
    attention = ComplexAttention(width.d_model, width.heads, width.kv_heads, config.stage.score)
    cast = autocast_dtype(config.stage.precision)
    with torch.autocast(device.type, cast, enabled=cast is not None):
        if not all(is_causal(router, z, other) for router in routers):
            return {"causal": False, "time_ms": None, "time_ratio": None}
        lengths = [max(1, length // part) for part in (1, *PARTS)]
        functions = [
            partial(mixer, z[:, :tokens].contiguous())
            for mixer in (routers[0], attention.to(device, dtype).eval())
            for tokens in lengths
        ]
        options = config.benchmark
        times = times_in_turns(functions, options.warmup, options.repeats, device)
    medians = [1e3 * quantile(own, 0.5) for own in times]
    return {
        "causal": True,
        "time_ms": medians[0],
        "time_ratio": quantile([whole / half for whole, half in zip(times[0], times[1], strict=True)], 0.5),
        "attention_time_ms": medians[len(lengths)],
        "times": sorted(zip(lengths, medians, strict=False)),
        "attention_times": sorted(zip(lengths, medians[len(lengths) :], strict=True)),
    }


def is_causal(router: nn.Module, z: Tensor, other: Tensor) -> bool:
    """Whether no bit before tokens all over a window changes with those from there on."""
    length = z.shape[1]
    before = router(z)
    for position in sorted({length // 7, length // 3, length // 2 + 1, length - 1}):
        changed = torch.cat((z[:, :position], other[:, position:]), 1)
        if not torch.equal(router(changed)[:, :position], before[:, :position]):
            return False
    return True


def judge(config: BenchConfig, results: Results) -> None:
    """The routers' causality, and the time of one."""
    measured = measure_part(config, results, "mera", "mera_time_ms", "mera_time_ratio")
    causal, time, share = (measured[key] for key in ("causal", "time_ms", "time_ratio"))
    results.criteria.append(("no bit of the routers changes with later tokens", causal, "true", causal))
    passes: list[bool | None] = [None, None]
    if causal is False:
        reason = "the time of a router that sees later tokens means nothing"
        results.leave_open(reason, "mera_time_ms", "mera_time_ratio")
    else:
        title = f"time of a router at {config.benchmark.seq_len} tokens [ms]"
        passes[0] = results.at_most(title, time, TIME_TARGET)
        passes[1] = results.at_most("the same / that of half of them", share, RATIO_TARGET)
    results.values |= {
        "mera_causal": causal,
        "mera_time_ms": time,
        "mera_time_pass": passes[0],
        "mera_time_ratio": share,
        "mera_time_ratio_pass": passes[1],
    }


def plot(models: Models) -> Any:
    """Times over tokens; none of a router that is not causal."""
    timed = {name: values for name, values in models.items() if values.get("causal")}
    lines: dict[str, Any] = {}
    for name, values in timed.items():
        lines |= {f"{name}: router": values["times"], "an attention": values["attention_times"]}
    return draw_lines("time of a forward pass", "tokens", "ms", lines) if lines else None


def workload(config: BenchConfig) -> Workload:
    """One long window."""
    return Workload(1, 4096)


BENCHMARK = Benchmark(
    measure={"mera": measure_mera},
    judge=judge,
    plot=plot,
    shown=(Metric("mera_time_ms", "time of a router [ms]"),),
    stages=("3",),
    workload=workload,
    check=require_part,
)
