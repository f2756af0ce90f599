"""Peak memory of a training step, by what holds it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from muse.benchmarks.setting import flow_of
from muse.benchmarks.step import benchmark_model, training_step
from muse.config import BenchConfig
from muse.dynamics import flow_metrics
from muse.errors import RunError
from muse.hardware import synchronize
from muse.measure.gradient_error import full_precision
from muse.measure.operations import InsideOperations
from muse.models import count_parameters

GB = 1e9


@full_precision()
def measure_memory(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Peak memory of the second training step, in GB (10^9 bytes).

    On CUDA the peak is the allocator's ``max_memory_allocated``; on the CPU MemTracker counts the bytes
    of all tensors exactly. The first step, which creates the optimiser's state, is not measured.

    Returns:
        ``peak``, and what it is made of: ``parameters``, ``optimiser``, ``activations`` (kept by the
        forward pass up to the loss) and ``gradients and temporaries`` (the rest at the peak);
        ``gradients`` is the size of all gradients, which are not all alive at the peak.

    Raises:
        RunError: when the measured step's loss is not finite.
    """
    model = benchmark_model(config, device)
    optimizer, step = training_step(config, model, device)
    step(lambda: None)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    optimizer.attach_gradients()
    state = optimizer.state_tensors()
    after_forward = before = peak = 0.0
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def note_cuda() -> None:
            nonlocal after_forward
            after_forward = torch.cuda.memory_allocated(device)

        loss = step(note_cuda)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        tracker = MemTracker()
        tracker.track_external(model, *state)

        def current() -> float:
            snapshot = tracker.get_tracker_snapshot("current")
            return sum(kinds["Total"] for kinds in snapshot.values())

        def note_cpu() -> None:
            nonlocal after_forward
            after_forward = current()

        with tracker, InsideOperations():
            before = current()
            loss = step(note_cpu)
        peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    if not math.isfinite(loss.item()):
        raise RunError(f"the loss of the measured step is {loss.item()}; its memory means nothing")
    parameters = _bytes(list(model.parameters()))
    optimiser = _bytes(state)
    activations = after_forward - before
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
        **flow_metrics(model),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
