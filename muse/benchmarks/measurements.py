"""Every measurement by its name, each run in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from muse.benchmarks.adjoint import measure_adjoint
from muse.benchmarks.energy import measure_energy, measure_trained_energy
from muse.benchmarks.gradient_modes import measure_modes
from muse.benchmarks.kernels import FAMILIES, measure_kernels
from muse.benchmarks.perplexity import measure_perplexity
from muse.benchmarks.speedup import (
    TARGET_LOSS,
    measure_speedup_memory,
    measure_speedup_pairs,
    measure_speedup_run,
)
from muse.benchmarks.stability import measure_gradients, measure_stability
from muse.benchmarks.throughput import measure_throughput
from muse.benchmarks.vram import measure_memory
from muse.config import BenchConfig
from muse.errors import ConfigError, RunError
from muse.files import finite
from muse.hardware import describe, use_hardware
from muse.processes.isolated import run_isolated

MEASUREMENTS: dict[str, Callable[[BenchConfig, torch.device], dict[str, Any]]] = {
    "perplexity": measure_perplexity,
    "vram": measure_memory,
    "throughput": measure_throughput,
    "stability": measure_stability,
    "gradients": measure_gradients,
    "modes": measure_modes,
    "energy": measure_energy,
    "trained energy": measure_trained_energy,
    "adjoint": measure_adjoint,
    "speedup": measure_speedup_run,
    "speedup until learned": partial(measure_speedup_run, until=TARGET_LOSS),
    "speedup pairs": measure_speedup_pairs,
    "speedup memory": measure_speedup_memory,
    **{f"kernels {family}": partial(measure_kernels, family) for family in FAMILIES},
}


def measure_isolated(measurement: str, config: BenchConfig) -> dict[str, Any]:
    """Run a measurement in a process of its own and return what it measured, as JSON has it.

    Peak memory, the allocator's caches and a CUDA context outlive a measurement in its process.

    Raises:
        RunError: when the process fails or is killed, e.g. for lack of memory.
    """
    try:
        return run_isolated(_measured, measurement, config)
    except ConfigError as error:
        # The others may go with the options.
        raise RunError(str(error)) from error


def _measured(measurement: str, config: BenchConfig) -> dict[str, Any]:
    device = use_hardware(config.hardware)
    try:
        values = MEASUREMENTS[measurement](config, device)
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of GPU memory: {str(error).splitlines()[0]}") from error
    precision = {"matmul_precision": torch.get_float32_matmul_precision()}
    told = finite({**precision, **values, "device": describe(device)})
    return dict(json.loads(json.dumps(told)))
