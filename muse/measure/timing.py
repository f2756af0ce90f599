"""Wall times of functions taken in turns: what slows the machine for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from muse.hardware import synchronize


def times_in_turns(
    functions: Sequence[Callable[[], object]],
    warmup: int,
    repeats: int,
    device: torch.device,
    calls: Sequence[int] | None = None,
) -> list[list[float]]:
    """Seconds of a call of each function in every one of ``repeats`` rounds.

    Args:
        functions: called one after the other in each round.
        warmup: rounds before those, whose times are left out.
        repeats: timed rounds.
        device: what they start work on.
        calls: how often each is called in a round, which a time is the mean of; once if None.
    """
    times: list[list[float]] = [[] for _ in functions]
    for number in range(warmup + repeats):
        for function, count, own in zip(functions, calls or [1] * len(functions), times, strict=True):
            seconds = seconds_of(function, device, count)
            if number >= warmup:
                own.append(seconds)
    return times


def seconds_of(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Mean wall time of a call, and of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def quantile(values: list[float], fraction: float) -> float:
    """The value that ``fraction`` of the sorted values lie below, without interpolation."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]
