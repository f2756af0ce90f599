"""The device a run uses, and its limits."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kernels.launch import use_eager
from muse.compiler import require_compiler
from muse.config import HardwareConfig
from muse.errors import ConfigError, RunError
from muse.processes.torchrun import check_launch, launched_ranks
from muse.runs.provenance import package_version


def use_hardware(config: HardwareConfig) -> torch.device:
    """Apply the hardware options to this process and return the device.

    Of the processes that torchrun starts on a machine each takes a GPU of its own.

    Raises:
        ConfigError: when CUDA is asked for and there is none, ``hardware.parallel`` does not fit the way in
            which this process was started, or there is no compiler for ``hardware.compile``.
        RunError: when there are fewer GPUs than processes.
    """
    check_launch(config.parallel)
    device = _use_device(config)
    if config.compile:
        require_compiler(device)
    return device


def _use_device(config: HardwareConfig) -> torch.device:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    use_eager(config.kernels == "eager")
    has_cuda = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not has_cuda):
        _keep_freed_memory()
        return torch.device("cpu")
    if not has_cuda:
        raise ConfigError("hardware.device=cuda needs a CUDA device and none was found; use hardware=cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched_ranks() else 0)
    if launched_ranks():
        if device.index >= torch.cuda.device_count():
            raise RunError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    if config.memory_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_gb * 1e9 / total), device)
    return device


@contextmanager
def restored_threads() -> Iterator[None]:
    """Leave the number of CPU threads as it was before; also a decorator."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let glibc's allocator keep large freed blocks instead of giving them back to the system.

    A training step frees and allocates the same gigabyte again and again; page faults on memory that comes
    back each time are 8 % of a step at model=seed. Without glibc nothing happens.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


def describe(device: torch.device) -> str:
    """Name of the device for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def machine(config: HardwareConfig, device: torch.device) -> dict[str, Any]:
    """What a measured time depends on beside options and code: equal where one may stand for another."""
    return {
        "hardware": asdict(config),
        "device": describe(device),
        "cores": os.cpu_count(),
        **{package: package_version(package) for package in ("torch", "triton")},
    }


def synchronize(device: torch.device) -> None:
    """Wait for all work on ``device``, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def torch_random_state(gpu: torch.device | str | None = "cuda") -> dict[str, Tensor]:
    """States of PyTorch's random generators in this process, on the CPU and ``gpu``, if it uses that one."""
    state = {"cpu": torch.get_rng_state()}
    if gpu is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state(gpu)
    return state


def restore_torch_random_state(state: dict[str, Any], gpu: torch.device | str = "cuda") -> None:
    """Set PyTorch's random generators to states from ``torch_random_state``."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], gpu)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Autocast dtype of a stage's precision; None where parameters and activations have one dtype."""
    return {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}.get(precision)
