"""The benchmarks of the stages and of the kernels: which are run for a stage, and by what they are judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from muse.benchmarks.criteria_decoder import (
    judge_gradients,
    judge_memory,
    judge_perplexity,
    judge_stability,
    judge_throughput,
)
from muse.benchmarks.criteria_flow import (
    judge_adjoint,
    judge_energy,
    judge_flow_memory,
    judge_flow_perplexity,
    judge_modes,
)
from muse.benchmarks.criteria_stack import judge_stack
from muse.benchmarks.kernel_criteria import judge_kernels
from muse.benchmarks.measurements import measure_isolated
from muse.benchmarks.results import Report
from muse.benchmarks.workload import settle
from muse.config import BenchConfig


def run_suite(config: BenchConfig, folder: Path) -> Report:
    """Run the chosen benchmark; ``all`` runs every one, and one that fails does not stop the others.

    Each measurement gets a process of its own; checkpoints go below ``folder``. The keys of one that failed
    are None, ``failures`` says why, and ``all_pass`` is None as long as one criterion is.
    """
    report = Report(measure_isolated)
    chosen = config.benchmark.name
    flows = config.stage.number == "2"
    benchmarks: dict[str, Callable[[BenchConfig, Report], None]] = {
        "vram": judge_flow_memory if flows else judge_memory,
        "throughput": judge_modes if flows else judge_throughput,
        "stability": judge_stability,
        "gradients": judge_gradients,
        **({"energy": judge_energy} if flows else {}),
        "perplexity": judge_flow_perplexity if flows else judge_perplexity,
    }
    if config.stage.number == "3a":
        benchmarks = {"speedup": partial(judge_stack, folder)}
    apart = {"kernels": judge_kernels, "adjoint": judge_adjoint}
    for name, benchmark in (benchmarks if chosen == "all" else {**benchmarks, **apart}).items():
        if chosen in (name, "all"):
            print(f"{name} ...", flush=True)
            benchmark(settle(config, name), report)
    report.judge()
    return report
