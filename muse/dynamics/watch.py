"""What the flows of a model do to its tokens, noted while it is evaluated or goes on with a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from muse.dynamics.energy import curvature, drift, trajectory
from muse.dynamics.hamiltonian_ode import HamiltonianNeuralODE, flows_of
from muse.errors import RunError
from muse.processes.ranks import rank

# Tokens of a flow that are followed, and products of V'' with a vector for its largest eigenvalue.
TOKENS = 128
ITERATIONS = 10


@contextmanager
def watched_flows(model: nn.Module) -> Iterator[dict[str, float]]:
    """Around an evaluation: measure every flow on the tokens of its first call, on the first rank.

    The forward pass that is there is watched, so that no rank has to run another one, which compiled or
    sharded models would have to be asked for. Training and evaluation have the same bits with it and without.

    Yields:
        A dict, filled when the block ends, empty for a model without flows. Of each flow, as
        ``flow/blocks_0_flow_1/...``, its name without the dots, by which W&B would part it:

        - ``energy``: mean H over tokens at the start;
        - ``drift_max`` and ``drift_mean``: max over the flow's own steps of |H_t - H_0| / |H_0|, of the worst
          token and the mean of all; NaN where a state is lost;
        - ``curvature_dt2``: the largest |eigenvalue| of V'' at a start, times dt^2;
        - ``fallen_back``: 1 if its gradients are taken by checkpointing since a failure, else 0;

        and of all, as ``flow/...``, the mean of ``energy`` and ``drift_mean``, the largest ``drift_max`` and
        ``curvature_dt2``, and ``fallback_share``, the share of flows that have fallen back.
    """
    metrics: dict[str, float] = {}
    flows = flows_of(model) if rank() == 0 else []
    measured: dict[str, dict[str, float]] = {}
    for flow in flows:
        flow.watch = _once(flow, measured)
    try:
        yield metrics
    finally:
        for flow in flows:
            flow.watch = None
    if not measured:
        return
    for name, values in measured.items():
        metrics |= {f"flow/{name.replace('.', '_')}/{key}": value for key, value in values.items()}
    for name, key, of_all in (
        ("energy", "energy", _mean),
        ("drift_max", "drift_max", _largest),
        ("drift_mean", "drift_mean", _mean),
        ("curvature_dt2", "curvature_dt2", _largest),
        ("fallback_share", "fallen_back", _mean),
    ):
        metrics[f"flow/{name}"] = of_all([values[key] for values in measured.values()])


@contextmanager
def recorded_flows(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Around the reading of a text: keep where the last token of each call starts its way through each flow.

    From that token's state the next one is drawn. The model has the same bits with it and without.

    Yields:
        By the name of a flow (q, p) as (2, D), one for each call so far.
    """
    flows = flows_of(model)
    starts: dict[str, list[Tensor]] = {flow.name: [] for flow in flows}

    def recorder(of_flow: list[Tensor]) -> Callable[[Tensor, Tensor], None]:
        return lambda q, p: of_flow.append(torch.stack((q[0, -1], p[0, -1])).detach())

    for flow in flows:
        flow.watch = recorder(starts[flow.name])
    try:
        yield starts
    finally:
        for flow in flows:
            flow.watch = None


def _once(
    flow: HamiltonianNeuralODE, measured: dict[str, dict[str, float]]
) -> Callable[[Tensor, Tensor], None]:
    def watch(q: Tensor, p: Tensor) -> None:
        flow.watch = None
        measured[flow.name] = _measure(flow, q, p)

    return watch


def _measure(flow: HamiltonianNeuralODE, q: Tensor, p: Tensor) -> dict[str, float]:
    """What ``watched_flows`` tells of a flow whose input is (q, p), both (..., D)."""
    rows = math.ceil(q[..., 0].numel() / TOKENS)
    q, p = (x.detach().flatten(0, -2)[::rows] for x in (q, p))
    values = {"energy": math.nan, "drift_max": math.nan, "drift_mean": math.nan}
    try:
        energies = trajectory(flow, q, p, flow.steps, modified=False).energy
        drifts = drift(energies)
        values = {
            "energy": energies[0].mean().item(),
            "drift_max": drifts.max().item(),
            "drift_mean": drifts.mean().item(),
        }
    except RunError:
        # Left the range of the fixed-point state; the flow itself falls back.
        pass
    bent = curvature(flow.potential, q, flow.potential.context(q, p), ITERATIONS).max().item()
    return {**values, "curvature_dt2": bent * flow.dt**2, "fallen_back": float(flow.fallen_back)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _largest(values: list[float]) -> float:
    """NaN if one is, which ``max`` would lose."""
    return math.nan if any(map(math.isnan, values)) else max(values)
