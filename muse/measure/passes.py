"""Forward and backward passes of functions, timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muse.measure.timing import seconds_of, times_in_turns

# A timing repeats fast functions until it takes about this long.
TIMING_SECONDS = 5e-3
MAX_CALLS = 100

Times = dict[str, dict[str, list[float]]]


class Passes:
    """The passes of a function of tensors, with its inputs and gradients for its outputs."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, inputs
        # Not under no_grad, for which compiled code would be compiled again.
        self.gradients = [torch.randn_like(out) for out in outputs(function(*inputs))]

    def forward(self) -> None:
        """As in training: what the backward pass needs is kept."""
        self.function(*self.inputs)

    def training(self) -> None:
        """Forward, and the gradient at every input."""
        torch.autograd.grad(outputs(self.function(*self.inputs)), self.inputs, self.gradients)


class Updates(Passes):
    """What has no backward pass: all of it is the forward one."""

    def training(self) -> None:
        """As ``forward``."""
        self.forward()


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What a function returns, one tensor or several, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def time_passes(calls: Mapping[str, Passes], warmup: int, repeats: int, device: torch.device) -> Times:
    """Seconds of ``forward`` and ``training`` (forward and backward) of each call, for every timed round."""
    parts = {
        (name, part): function
        for name, call in calls.items()
        for part, function in (("forward", call.forward), ("training", call.training))
    }
    counts = []
    for function in parts.values():
        function()
        once = seconds_of(function, device)
        counts.append(min(MAX_CALLS, max(1, math.ceil(TIMING_SECONDS / once))))
    times: Times = {name: {} for name in calls}
    seconds = times_in_turns(list(parts.values()), warmup, repeats, device, counts)
    for (name, part), own in zip(parts, seconds, strict=True):
        times[name][part] = own
    return times
