"""``profile=true``: where the time and the memory of a training's steps go, and how much it uses the device.

The first steps of the process are looked at, and the training goes on unwatched after them:

=====  ========================================================================================
steps  what happens
=====  ========================================================================================
1-2    nothing; memory is allocated, code compiled
3      the memory is recorded
4-8    the steps are timed as they are, for the utilisation
9      the profiler warms up
10-12  the profiler records
=====  ========================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, schedule
from tqdm import tqdm

from muse.config import RunConfig
from muse.errors import ConfigError
from muse.files import write_json
from muse.measure.timing import quantile
from muse.measure.utilisation import Utilisation, measure_utilisation, model_flops
from muse.models import LanguageModel
from muse.processes.ranks import rank
from muse.report.table import table
from muse.training.memory_snapshot import memory_file, memory_snapshot
from muse.training.optim import ModelOptimizer

SETTLING, TIMED, WARMUP, RECORDED = 2, 5, 1, 3
STEPS = SETTLING + 1 + TIMED + WARMUP + RECORDED
TOP = 10
FILE = "profile.json"
TRACE_FILE = "trace.json.gz"
# The profiler's name for all that runs between two of its steps; its own time is that of no operation.
STEP = "ProfilerStep"


@dataclass(frozen=True)
class Operation:
    """An operation in the recorded steps.

    Attributes:
        name: operator of torch or of ``kernels/``.
        self_ms: its time without that of operations it calls; on CUDA, of the kernels it launches.
        share: of the time of all operations and of what is outside operations.
        calls: how often it ran.
        memory_mb: MB (10^6 bytes) that it allocated less what it freed.
    """

    name: str
    self_ms: float
    share: float
    calls: int
    memory_mb: float


@dataclass
class Profile:
    """What ``profile.json`` holds; what a run that ended early did not reach stays empty.

    Attributes:
        steps: finished steps, of ``STEPS``.
        recorded_steps: finished steps in the trace and the table.
        operations: those with the most time of their own.
        outside_operations: share of the time: Python between operations, on CUDA kernels that none launched.
        device_idle: share of a timed step in which a GPU ran no kernel; None on a CPU.
        utilisation: model FLOPs utilisation.
        step_seconds: the timed steps.
        files: what was written beside this.
    """

    steps: int = 0
    recorded_steps: int = 0
    operations: list[Operation] = field(default_factory=list)
    outside_operations: float = 0.0
    device_idle: float | None = None
    utilisation: Utilisation | None = None
    step_seconds: list[float] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def require_steps(config: RunConfig, done: int) -> None:
    """Refuse to profile a run that is too short.

    Args:
        config: of the run.
        done: steps that a run has made which this one continues.

    Raises:
        ConfigError: fewer than ``STEPS`` steps are left.
    """
    if config.profile and config.train.steps < done + STEPS:
        after = f" after the {done} that are done" if done else ""
        raise ConfigError(
            f"train.steps={config.train.steps} is too few; profile=true needs {STEPS} steps{after}, so "
            f"train.steps of at least {done + STEPS}, or profile=false"
        )


@contextmanager
def profiled(
    config: RunConfig,
    model: LanguageModel,
    optimizer: ModelOptimizer,
    vocab_size: int,
    device: torch.device,
    run: Path,
) -> Iterator[Callable[[float], None]]:
    """Look at the first steps of a training, of the first rank, where ``config.profile`` says so.

    Yields:
        What to call after every step with the seconds that it took; it does nothing without ``profile``.
        A training that ends early, however it does, leaves what was recorded up to then.
    """
    if not config.profile or rank() > 0:
        yield lambda seconds: None
        return
    steps = _look_at_steps(config, model, optimizer, vocab_size, device, run)
    next(steps)
    try:
        yield steps.send
    finally:
        steps.close()


def _look_at_steps(
    config: RunConfig,
    model: LanguageModel,
    optimizer: ModelOptimizer,
    vocab_size: int,
    device: torch.device,
    run: Path,
) -> Generator[None, float, None]:
    """Waits at each ``yield`` while the training takes a step, whose seconds it is sent."""
    flops = model_flops(config, vocab_size, device)
    profile = Profile()
    try:
        for _ in range(SETTLING):
            yield
            profile.steps += 1
        if device.type == "cpu" and config.hardware.compile:
            tqdm.write("the memory is not recorded: on a CPU that takes the step without hardware.compile")
            yield
        else:
            profile.files.append(memory_file(device))
            with memory_snapshot(run, model, optimizer, device):
                yield
        profile.steps += 1
        for _ in range(TIMED):
            profile.step_seconds.append((yield))
            profile.steps += 1
        profile.utilisation = measure_utilisation(flops, profile.step_seconds, device)
        yield from _record(profile, device, run)
    finally:
        write_json(run / FILE, asdict(profile))
        tqdm.write(_summary(profile, run))
    while True:
        yield


def _record(profile: Profile, device: torch.device, run: Path) -> Generator[None, float, None]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=WARMUP, active=RECORDED, repeat=1),
        record_shapes=True,
        profile_memory=True,
        # Without it torch 2.11 warns of cycles before the only one.
        acc_events=True,
    )
    recording = False
    try:
        with profiler:
            for step in range(WARMUP + RECORDED):
                yield
                profile.steps += 1
                profile.recorded_steps += recording
                recording = step + 1 >= WARMUP
                profiler.step()
    finally:
        if recording:
            temporary = run / f".tmp.{TRACE_FILE}"
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, run / TRACE_FILE)
            profile.files.append(TRACE_FILE)
            profile.operations, profile.outside_operations = rank_operations(
                profiler.key_averages(), device.type == "cuda"
            )
            if device.type == "cuda":
                profile.device_idle = idle_share(
                    profile.operations, profile.recorded_steps, profile.step_seconds
                )


def rank_operations(events: Iterable[Any], on_gpu: bool) -> tuple[list[Operation], float]:
    """The ``TOP`` operations with the most time of their own, and the share of time outside operations.

    Args:
        events: the profiler's averages by name. Kernels are events, too, but count for what launched them.
        on_gpu: whether the time is that of the GPU.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    total = sum(map(own, events)) or 1.0
    outside = sum(own(event) for event in events if event.key.startswith(STEP))
    ranked = sorted((event for event in events if not event.key.startswith(STEP)), key=own, reverse=True)
    operations = [
        Operation(
            event.key,
            own(event) / 1e3,
            own(event) / total,
            event.count,
            (event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage) / 1e6,
        )
        for event in ranked[:TOP]
    ]
    return operations, outside / total


def idle_share(operations: Sequence[Operation], steps: int, seconds: list[float]) -> float | None:
    """The share of a step in which no kernel runs; None where none was recorded.

    The profiler makes steps longer, but not the kernels in them.

    Args:
        operations: of recorded steps, with the time of kernels.
        steps: that were recorded.
        seconds: of steps that were not.
    """
    if not operations or not operations[0].share or not steps or not seconds:
        return None
    milliseconds = operations[0].self_ms / operations[0].share / steps
    return max(0.0, 1 - milliseconds / (1e3 * quantile(seconds, 0.5)))


def _summary(profile: Profile, run: Path) -> str:
    parts = []
    if profile.steps < STEPS:
        parts.append(f"the run ended after {profile.steps} of the {STEPS} steps that profile=true looks at")
    if profile.operations:
        rows = [(o.name, o.self_ms, f"{o.share:.1%}", o.calls, o.memory_mb) for o in profile.operations]
        header = (f"operation in {profile.recorded_steps} steps", "self ms", "share", "calls", "memory MB")
        parts.append(table(header, rows))
        parts.append(f"outside operations: {profile.outside_operations:.1%} of the time")
    if profile.device_idle is not None:
        parts.append(f"without a kernel: {profile.device_idle:.1%} of a step")
    if profile.utilisation is not None:
        parts.append(profile.utilisation.sentences())
    names = ", ".join([FILE, *profile.files])
    return "\n" + "\n".join(parts) + f"\nprofile in {run}: {names}\n"
