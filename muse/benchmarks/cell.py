"""One measurement in a process of its own.

Peak memory, the allocator's caches and a CUDA context outlive a measurement in its process, so each
measurement gets a fresh one: ``python -m muse.benchmarks.cell <request.json> <answer.json>``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from muse.benchmarks.adjoint import measure_adjoint
from muse.benchmarks.energy import measure_energy, measure_trained_energy
from muse.benchmarks.health import measure_gradients, measure_stability
from muse.benchmarks.kernels import FAMILIES, measure_kernels
from muse.benchmarks.memory import measure_memory
from muse.benchmarks.modes import measure_modes
from muse.benchmarks.perplexity import measure_perplexity
from muse.benchmarks.speedup import (
    TARGET_LOSS,
    measure_speedup_memory,
    measure_speedup_pairs,
    measure_speedup_run,
)
from muse.benchmarks.throughput import measure_throughput
from muse.config import BenchConfig
from muse.errors import ConfigError, RunError
from muse.files import write_json
from muse.hardware import describe, use_hardware
from muse.runs.provenance import ROOT

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


def measure_apart(measurement: str, config: BenchConfig) -> dict[str, Any]:
    """Run a measurement in a fresh process and return what it measured.

    Raises:
        RunError: when the process fails or is killed, e.g. for lack of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(request, {"measurement": measurement, "config": dataclasses.asdict(config)})
        command = [sys.executable, "-m", "muse.benchmarks.cell", str(request), str(answer)]
        status = subprocess.run(command, env=_environment(), check=False).returncode
        if not answer.exists():
            cause = "was killed, perhaps for lack of memory" if status < 0 else f"ended with status {status}"
            raise RunError(f"measuring {measurement} of stage {config.stage.number} {cause}")
        values: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in values:
        raise RunError(values["error"])
    return values


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def main(request: Path, answer: Path) -> None:
    """Measure what ``request`` asks for and write ``answer``."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BenchConfig), asked["config"]))
    assert isinstance(config, BenchConfig)
    try:
        device = use_hardware(config.hardware)
        values = MEASUREMENTS[asked["measurement"]](config, device)
        precision = {"matmul_precision": torch.get_float32_matmul_precision()}
        write_json(answer, {**precision, **values, "device": describe(device)})
    except (ConfigError, RunError) as error:
        write_json(answer, {"error": str(error)})
    except torch.OutOfMemoryError as error:
        write_json(answer, {"error": f"out of GPU memory: {str(error).splitlines()[0]}"})


if __name__ == "__main__":
    # As Hydra shows it in its own process.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
