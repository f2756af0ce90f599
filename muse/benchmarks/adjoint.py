"""``benchmark=adjoint``: the flow beside ``odeint_adjoint`` of torchdiffeq, which one would take instead.

Both solve the same vector field. The adjoint of torchdiffeq solves another differential equation backwards
in time: what it returns is not the gradient of the steps that were taken, but one that they would converge
to.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muse.benchmarks.benchmark import Benchmark
from muse.benchmarks.results import Results
from muse.benchmarks.workload import Workload, batch_shape
from muse.config import GRADIENTS, BenchConfig
from muse.dynamics import INTEGRATORS, HamiltonianNeuralODE, Potential
from muse.errors import RunError
from muse.measure.gradient_error import ALLOWED, full_precision, joined, relative_error
from muse.measure.passes import Passes, time_passes
from muse.measure.peak_memory import GB, peak_memory
from muse.measure.timing import quantile
from muse.models.hamiltonian import flow_potential
from muse.report.sweep_plot import Metric

# Root mean square of a channel of the initial state.
RMS = 0.7
# Tokens that gradients are compared on: float64 backpropagation keeps every stage.
CHECKED_TOKENS = 128
# The two of torchdiffeq with steps of equal size that correspond to leapfrog and to schemes of order 4.
ORDERS = {"midpoint": 2, "rk4": 4}
OURS = "leapfrog exact"
KEYS = (
    "adjoint_time_ratio_midpoint",
    "adjoint_time_ratio_rk4",
    "adjoint_gradient_error_midpoint",
    "adjoint_gradient_error_rk4",
    "exact_gradient_error",
    "exact_peak_gb",
    "adjoint_peak_gb",
    "matmul_precision",
    "fallback_count",
    "tokens",
    "channels",
    "hidden",
)

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to the final planar state and its gradient.

    Attributes:
        build: makes it of a potential.
        exact: makes plain autograd through the same discrete map of it.
        order: of convergence.
    """

    build: Callable[[Potential], Run]
    exact: Callable[[Potential], Run]
    order: int


def measure_adjoint(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Gradient error, time and memory of ours and torchdiffeq's in float32.

    The potential is that of one layer, the input normal with a root mean square of 0.7 a channel, and all
    take ``benchmark.ode_steps`` steps of ``benchmark.dt``. "torchdiffeq midpoint" and "rk4" are asked for the
    final state and keep nothing else; "every state" keeps all states and begins each step of the adjoint
    anew from the right one.

    Returns:
        ``methods``: by name ``order``, ``gradient_error`` (of input and parameters together, against float64
        autograd through the same discrete map), ``training_ms_p20``, ``_p50`` and ``_p80`` (forward and
        backward), ``forward_ms_p50``, ``time_ratio`` (median over rounds of its time over that of exact
        leapfrog), ``peak_gb`` (beyond input and parameters) and ``force_evaluations`` (forward and backward);
        ``adjoint_time_ratio_<method>`` and ``adjoint_gradient_error_<method>`` of torchdiffeq's midpoint and
        rk4; ``exact_gradient_error`` and ``exact_peak_gb`` of exact leapfrog, ``adjoint_peak_gb`` of
        midpoint; ``fallback_count``; ``tokens``, ``channels`` and ``hidden``.

    Raises:
        RunError: torchdiffeq is not installed, or a gradient is not finite.
    """
    try:
        torchdiffeq = importlib.import_module("torchdiffeq")
    except ModuleNotFoundError as error:
        raise RunError("benchmark=adjoint needs torchdiffeq: pip install -e .[dev]") from error
    with full_precision():
        return _measure(config, device, torchdiffeq)


def _measure(config: BenchConfig, device: torch.device, torchdiffeq: Any) -> dict[str, Any]:
    potential = _potential(config).to(device)
    width = config.model.complex.d_model
    tokens = math.prod(batch_shape(config))
    generator = torch.Generator().manual_seed(config.seed)
    z = (RMS * torch.randn(tokens, 2, width, generator=generator)).to(device)
    methods = _methods(config, torchdiffeq)
    rows = {name: _checked(name, method, potential, z[:CHECKED_TOKENS]) for name, method in methods.items()}
    runs = {name: method.build(potential) for name, method in methods.items()}
    leaves = (z.requires_grad_(), *potential.parameters())
    calls = {name: Passes(partial(_called, run), leaves) for name, run in runs.items()}
    times = time_passes(calls, config.benchmark.warmup, config.benchmark.repeats, device)
    for name, row in rows.items():
        seconds = times[name]["training"]
        ratios = [own / ours for own, ours in zip(seconds, times[OURS]["training"], strict=True)]
        with warnings.catch_warnings():
            # MemTracker says so of the modules of torchdiffeq, which are gone before the backward pass ends.
            warnings.filterwarnings("ignore", "Module is None")
            with peak_memory(device) as meter:
                calls[name].training()
                peak = meter.peak() - meter.before
        row |= {f"training_ms_p{percent}": 1e3 * quantile(seconds, percent / 100) for percent in (20, 50, 80)}
        row |= {
            "forward_ms_p50": 1e3 * quantile(times[name]["forward"], 0.5),
            "time_ratio": quantile(ratios, 0.5),
            "peak_gb": peak / GB,
        }
    theirs = {method: rows[f"torchdiffeq {method}"] for method in ORDERS}
    flows = [run for run in runs.values() if isinstance(run, HamiltonianNeuralODE)]
    return {
        "methods": rows,
        **{f"adjoint_time_ratio_{method}": row["time_ratio"] for method, row in theirs.items()},
        **{f"adjoint_gradient_error_{method}": row["gradient_error"] for method, row in theirs.items()},
        "exact_gradient_error": rows[OURS]["gradient_error"],
        "exact_peak_gb": rows[OURS]["peak_gb"],
        "adjoint_peak_gb": theirs["midpoint"]["peak_gb"],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "fallback_count": sum(int(flow.fallback_count.item()) for flow in flows),
        "tokens": tokens,
        "channels": width,
        "hidden": next(potential.parameters()).shape[0],
    }


def _called(run: Run, z: Tensor, *_: Tensor) -> Tensor:
    """The run as a function of all that gradients are wanted of."""
    # MemTracker cannot watch a module that is given a leaf.
    return _end(run, z.view_as(z))


def _end(run: Run, z: Tensor) -> Tensor:
    """The final state of planar z, planar."""
    if isinstance(run, HamiltonianNeuralODE):
        return torch.stack(run(*z.unbind(-2)), -2)
    return run(z)


def _potential(config: BenchConfig) -> Potential:
    """An MLP as large as that of a layer, of q alone, with float32 products.

    torchdiffeq takes no gradient by what a field depends on beside its parameters and state.
    """
    stage = dataclasses.replace(config.stage, potential="mlp", force_precision="fp32", flows=1, context=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return flow_potential(config.model.complex, stage)


def _methods(config: BenchConfig, torchdiffeq: Any) -> dict[str, Method]:
    steps, dt, bits = config.benchmark.ode_steps, config.benchmark.dt, config.stage.fraction_bits
    assert steps is not None
    assert dt is not None
    methods = {}
    for integrator in dict.fromkeys(("leapfrog", config.stage.integrator)):
        flow = partial(HamiltonianNeuralODE, steps=steps, dt=dt, integrator=integrator, fraction_bits=bits)
        for mode in GRADIENTS:
            name = f"{integrator} {mode}"
            build, plain = partial(flow, gradient=mode, name=name), partial(flow, gradient="backprop")
            methods[name] = Method(build, plain, INTEGRATORS[integrator].order)
    for label, every in (("", False), (", every state", True)):
        for scheme, order in ORDERS.items():
            solved = partial(_solved, torchdiffeq, scheme=scheme, steps=steps, dt=dt, every=every)
            name = f"torchdiffeq {scheme}{label}"
            methods[name] = Method(partial(solved, adjoint=True), partial(solved, adjoint=False), order)
    return methods


def _solved(
    torchdiffeq: Any, potential: Potential, scheme: str, steps: int, dt: float, every: bool, adjoint: bool
) -> Run:
    """The flow by torchdiffeq, with its adjoint or plain autograd; ``every`` asks for all states."""

    def field(_: Tensor, state: Tensor) -> Tensor:
        q, p = state.unbind(-2)
        return torch.stack((p, potential.force(q, *potential.coefficients())), -2)

    def grid(_: Any, __: Tensor, ends: Tensor) -> Tensor:
        # As many steps within the times that are asked for, and all of one size.
        return ends if every else times.flip(0) if ends[0] > ends[-1] else times

    device = next(potential.parameters()).device
    times = torch.linspace(0, steps * dt, steps + 1, dtype=torch.float64, device=device)
    asked = times if every else times[[0, -1]]
    options = {"grid_constructor": grid}
    if adjoint:
        solve = partial(torchdiffeq.odeint_adjoint, adjoint_params=tuple(potential.parameters()))
    else:
        solve = torchdiffeq.odeint

    def run(z: Tensor) -> Tensor:
        states: Tensor = solve(field, z, asked, method=scheme, options=options)
        return states[-1]

    return _Root(run)


class _Root(nn.Module):
    """A module around those that torchdiffeq calls more than once, which MemTracker needs."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, z: Tensor) -> Tensor:
        return self.run(z)


def _checked(name: str, method: Method, potential: Potential, z: Tensor) -> dict[str, Any]:
    """The error of the gradient on z, and the number of forces that it took."""
    counted, count = copy.deepcopy(potential), 0
    field = counted.field

    def counting(*coefficients: Tensor) -> Callable[[Tensor], Tensor]:
        force = field(*coefficients)

        def counted_force(q: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return force(q)

        return counted_force

    counted.field = counting  # type: ignore[method-assign]
    run = method.build(counted)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    gradient = _gradient(run, counted, z, cotangent)
    double = copy.deepcopy(potential).double()
    exact = _gradient(method.exact(double), double, z.double(), cotangent.double())
    error = relative_error(gradient, exact)
    if not math.isfinite(error):
        raise RunError(f"{name}: the gradient is not finite; a smaller benchmark.dt may help")
    if not count:
        # Two operations evaluate the forces of all stages, one forward and one backward.
        assert isinstance(run, HamiltonianNeuralODE)
        count = 2 * run.stages.forces
    return {"order": method.order, "gradient_error": error, "force_evaluations": count}


def _gradient(run: Run, potential: Potential, z: Tensor, cotangent: Tensor) -> Tensor:
    leaves = (z.clone().requires_grad_(), *potential.parameters())
    return joined(torch.autograd.grad(_end(run, leaves[0]), leaves, cotangent))


def judge(config: BenchConfig, results: Results) -> None:
    """Time and gradient beside those of torchdiffeq."""
    measured = results.run("adjoint", config)
    if measured:
        results.details["adjoint"] = measured["methods"]
    off = measured["exact_gradient_error"]
    results.values |= {key: measured[key] for key in KEYS}
    for method in ORDERS:
        times = measured[f"adjoint_time_ratio_{method}"]
        passed = None if times is None else times > 1
        results.criteria.append((f"torchdiffeq {method} / exact leapfrog, time", times, "> 1", passed))
    results.at_most("gradient error of exact", off, ALLOWED)


BENCHMARK = Benchmark(
    measure={"adjoint": measure_adjoint},
    judge=judge,
    shown=(Metric("adjoint_time_ratio_midpoint", "time of torchdiffeq's midpoint / exact"),),
    stages=("2",),
    trained=False,
    workload=lambda config: Workload(2, 512, of_model=True),
)
