"""Peak memory of a training step, by what holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muse.benchmarks.model import benchmark_model, training_step
from muse.benchmarks.workload import flow_of
from muse.config import BenchConfig
from muse.dynamics import flow_metrics
from muse.measure.gradient_error import full_precision
from muse.measure.peak_memory import peak_memory
from muse.models import count_parameters

GB = 1e9


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
    step, take = training_step(config, model, device)
    take()
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
        take()
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
        **flow_metrics(model),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
