"""``benchmark=energy``: conservation of energy along every flow of a model of stage 2 or 3."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.criteria import all_of
from muse.benchmarks.model import benchmark_model, random_tokens, train_briefly
from muse.benchmarks.results import Results, Unmeasured
from muse.benchmarks.workload import Workload, batch_shape
from muse.config import FLOWING, BenchConfig
from muse.data import evaluation_batches, load_tokens
from muse.dynamics import HamiltonianNeuralODE, MLPPotential, flows_of
from muse.dynamics.energy import DRIFT_TARGET, MONOTONE_SHARE, curvature, drift, monotone_share, trajectory
from muse.errors import ConfigError, RunError
from muse.hardware import autocast_dtype
from muse.measure.gradient_error import full_precision
from muse.models import LanguageModel
from muse.options import changed
from muse.report.plots import draw_lines
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import ResultTable, lines_table, model_tables

# Tokens of a layer that stand for all in the figures beside the criterion.
SAMPLE = 512
# Tokens of a layer at which the curvature is worked out.
CURVATURE_SAMPLE = 256

Layer = tuple[HamiltonianNeuralODE, Tensor]


@full_precision()
def measure_energy(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Follow H of every token through ``benchmark.ode_steps`` steps of ``benchmark.dt`` in every layer.

    A flow begins where a forward pass on the validation text, or on random tokens if the model is untrained,
    begins it, and runs as the stage has it: precision of the force, fixed point, and unless
    ``benchmark.integrator`` is another one the integrator.

    Returns:
        Energies have no unit, a drift is |E_t - E_0| / |E_0| of a token.

        - ``max_drift``: the largest over layers, tokens and times; ``mean_drift``: the mean over tokens of
          the largest of each; ``monotone_share``: the share of tokens whose energy moves one way; the latter
          two each of the layer where it is largest;
        - ``energy_trajectory`` (mean over tokens) and ``drift_trajectory`` (largest of a token) over
          ``times``, and ``mean_energy`` at the start, of the layer with the largest drift, which
          ``worst_layer`` names;
        - ``own_dt_max_drift``: for the same time in steps of ``stage.dt``; None if the state is lost then;
        - ``leapfrog_max_drift``, ``leapfrog_mean_drift``, ``leapfrog_drift_trajectory``, and
          ``leapfrog_modified_drift``, the largest of the modified Hamiltonian; of ``sample_tokens`` a layer;
        - ``other_precision_max_drift``: with products of the force in ``other_precision``, None for a
          potential without products; of ``sample_tokens`` a layer;
        - ``curvature_max``: largest |eigenvalue| of V'' at the start, and ``curvature_dt2``, that times dt^2;
        - ``integrator``, ``layers``, ``tokens`` of each, ``matmul_precision`` (of float32 products, always
          the highest), and ``trained``: how the weights came about.

    Raises:
        ConfigError: the model has no flow.
        RunError: a state is not finite, or leaves its range.
    """
    checkpoint = config.benchmark.checkpoint
    valid = None
    if checkpoint is not None and config.data.name != "synthetic":
        data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
        config, valid = changed(config, model={"vocab_size": data.vocab_size}), data.valid
    # Compiled code calls no hooks.
    model = benchmark_model(changed(config, hardware={"compile": False}), device)
    return _energy_of(model, valid, config, device, f"checkpoint {checkpoint}" if checkpoint else "untrained")


def measure_trained_energy(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """The same after ``benchmark.train_steps`` steps of training in this run.

    Raises:
        ConfigError: the model has no flow.
        RunError: a state, or a loss on the way, is not finite, or a state leaves its range.
    """
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    config = changed(config, model={"vocab_size": data.vocab_size})
    eager = changed(config, hardware={"compile": False})
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train_briefly(eager, data, device, Path(folder), [])
    steps = config.benchmark.train_steps
    valid = None if config.data.name == "synthetic" else data.valid
    return _energy_of(model, valid, config, device, f"{steps} steps in this run")


@full_precision()
def _energy_of(
    model: LanguageModel, text: np.ndarray | None, config: BenchConfig, device: torch.device, trained: str
) -> dict[str, Any]:
    steps, dt, scheme = config.benchmark.ode_steps, config.benchmark.dt, config.benchmark.integrator
    assert steps is not None
    assert dt is not None
    assert scheme is not None
    batch, length = batch_shape(config)
    own_dt = config.stage.dt
    if text is None:
        tokens, _ = random_tokens(config, device)
    else:
        tokens, _, _ = next(evaluation_batches(text, length, batch))
    layers = _inputs_of_flows(model, tokens.to(device), autocast_dtype(config.stage.precision))
    samples = [(flow, _evenly(z, SAMPLE)) for flow, z in layers]
    own = [_followed(layer, steps, dt, scheme) for layer in layers]
    leapfrog, modified = zip(*(_leapfrog(layer, steps, dt) for layer in samples), strict=True)
    others, precision = _in_other_precision(samples)
    worst, worst_leapfrog = _worst(own), _worst(leapfrog)
    energies = own[worst]
    curved = _most([_curvature(flow, _evenly(z, CURVATURE_SAMPLE)) for flow, z in layers])
    return {
        "max_drift": _largest(own),
        "mean_drift": _most([drift(kept).mean() for kept in own]),
        "mean_energy": energies[0].mean().item(),
        "monotone_share": _most([_monotone_share(kept) for kept in own]),
        "worst_layer": layers[worst][0].name,
        "integrator": scheme,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "times": [dt * step for step in range(steps + 1)],
        "energy_trajectory": energies.mean(1).tolist(),
        "drift_trajectory": _over_time(energies),
        "own_dt_max_drift": _drift_if_kept(layers, max(1, round(steps * dt / own_dt)), own_dt, scheme),
        "leapfrog_max_drift": _largest(leapfrog),
        "leapfrog_mean_drift": _most([drift(kept).mean() for kept in leapfrog]),
        "leapfrog_drift_trajectory": _over_time(leapfrog[worst_leapfrog]),
        "leapfrog_modified_drift": _largest(modified),
        "other_precision": precision,
        "other_precision_max_drift": _drift_if_kept(others, steps, dt, scheme) if others else None,
        "curvature_max": curved,
        "curvature_dt2": curved * dt**2,
        "layers": len(layers),
        "tokens": len(layers[0][1]),
        "sample_tokens": len(samples[0][1]),
        "trained": trained,
    }


@torch.no_grad()
def _inputs_of_flows(model: LanguageModel, tokens: Tensor, cast: torch.dtype | None) -> list[Layer]:
    """Every flow, and the planar states (tokens, 2, D) that a forward pass gives it."""
    layers: list[Layer] = []

    def note(flow: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(flow, HamiltonianNeuralODE)
        layers.append((flow, torch.stack(inputs, -2).detach().flatten(0, -3)))

    flows = flows_of(model)
    if not flows:
        raise ConfigError("benchmark=energy is about the flow; it needs stage=2 or 3")
    hooks = [flow.register_forward_pre_hook(note) for flow in flows]
    model.eval()
    try:
        with torch.autocast(tokens.device.type, cast, enabled=cast is not None):
            model.features(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def _evenly(z: Tensor, count: int) -> Tensor:
    """At most ``count`` rows of z, evenly spaced."""
    return z[:: math.ceil(len(z) / count)]


def _curvature(flow: HamiltonianNeuralODE, z: Tensor) -> Tensor:
    """The largest at the start of a token."""
    q, p = z.float().unbind(-2)
    return curvature(flow.potential, q, flow.potential.context(q, p)).max()


def _followed(layer: Layer, steps: int, dt: float, scheme: str) -> Tensor:
    """Energies (steps + 1, tokens)."""
    flow, z = layer
    q, p = z.unbind(-2)
    return trajectory(flow, q, p, steps, dt, scheme, modified=False).energy


def _leapfrog(layer: Layer, steps: int, dt: float) -> tuple[Tensor, Tensor]:
    """Energies by leapfrog, and its modified Hamiltonian."""
    flow, z = layer
    q, p = z.unbind(-2)
    path = trajectory(flow, q, p, steps, dt, "leapfrog")
    return path.energy, path.modified


def _drift_if_kept(layers: list[Layer], steps: int, dt: float, scheme: str) -> float | None:
    """The largest drift; None where a state is lost, which must not cost the figures of the criterion."""
    try:
        return _largest([_followed(layer, steps, dt, scheme) for layer in layers])
    except RunError:
        return None


def _in_other_precision(layers: list[Layer]) -> tuple[list[Layer], str | None]:
    """Copies of the flows whose forces take half-precision products, or float32 ones if theirs are half."""
    others, name = [], None
    for flow, z in layers:
        if isinstance(flow.potential, MLPPotential):
            other = copy.deepcopy(flow)
            assert isinstance(other.potential, MLPPotential)
            single = other.potential.force_dtype == torch.float32
            other.potential.force_dtype = torch.bfloat16 if single else torch.float32
            name = "bf16" if single else "fp32"
            others.append((other, z))
    return others, name


def _over_time(energies: Tensor) -> list[float]:
    """The largest drift of a token at each time."""
    return ((energies - energies[0]).abs() / energies[0].abs()).amax(1).tolist()


def _largest(energies: list[Tensor] | tuple[Tensor, ...]) -> float:
    """The largest drift over layers, tokens and times."""
    return _most([drift(kept).max() for kept in energies])


def _worst(energies: list[Tensor] | tuple[Tensor, ...]) -> int:
    """The layer with the largest drift."""
    return int(torch.stack([drift(kept).max() for kept in energies]).argmax())


def _most(of_layers: list[Tensor]) -> float:
    """The largest; NaN if one is, which Python's max would lose, and which is null in the result."""
    return torch.stack(of_layers).max().item()


def _monotone_share(energies: Tensor) -> Tensor:
    share = monotone_share(energies) if energies.isfinite().all() else math.nan
    return torch.tensor(share, dtype=torch.float64)


def judge(config: BenchConfig, results: Results) -> None:
    """Drift of the energy, untrained and trained."""
    chosen = config.benchmark
    untrained = changed(config, benchmark={"checkpoint": None})
    measured = {"untrained": results.measure("energy", "untrained", untrained)}
    if chosen.checkpoint is not None:
        measured["trained"] = results.measure("energy", "trained", config)
    elif chosen.train_steps:
        measured["trained"] = results.measure("trained energy", "trained", config, shown_as="energy")
    last = measured.get("trained", measured["untrained"])
    if "trained" not in measured:
        # The criterion is about both.
        measured["trained"] = Unmeasured()
        results.unjudged["energy_pass"] = (
            "only the untrained model was measured; give benchmark.checkpoint or benchmark.train_steps"
        )
    drifts = {name: values["max_drift"] for name, values in measured.items()}
    shares = {name: values["monotone_share"] for name, values in measured.items()}
    kept, few = [], []
    for name in measured:
        kept.append(results.at_most(f"energy drift, {name}", drifts[name], DRIFT_TARGET, "<"))
        few.append(results.at_most(f"monotone tokens, {name}", shares[name], MONOTONE_SHARE))
    swings = all_of(few)
    results.values |= {
        **{key: last[key] for key in ("mean_energy", "max_drift", "mean_drift", "energy_trajectory")},
        "max_drift_untrained": drifts["untrained"],
        "max_drift_leapfrog": last["leapfrog_max_drift"],
        "curvature_dt2": last["curvature_dt2"],
        "monotonic_violation": None if swings is None else not swings,
        "energy_pass": all_of([*kept, *few]),
    }


def _drifts(models: Models) -> dict[str, list[tuple[float, float]]]:
    """(time, drift) of every flow that ``energy`` followed, and of leapfrog; the start has no drift."""
    return {
        f"{name}, {scheme}": list(zip(values["times"][1:], values[key][1:], strict=True))
        for name, values in models.items()
        for scheme, key in (
            (values["integrator"], "drift_trajectory"),
            ("leapfrog", "leapfrog_drift_trajectory"),
        )
    }


def plot(models: Models) -> Any:
    """The drift over time, and what is allowed."""
    return draw_lines(
        "energy drift of the worst token of the worst layer",
        "time",
        "|E - E0| / |E0|",
        _drifts(models),
        log=True,
        limit=(f"allowed: {DRIFT_TARGET:g}", DRIFT_TARGET),
    )


def tables(models: Models) -> list[ResultTable]:
    """The models, and trajectories of the energy and of its drift.

    The drift is a logarithm because W&B's plots have linear axes; what is allowed is a line beside it.
    """
    kept = {
        name: list(zip(values["times"], values["energy_trajectory"], strict=True))
        for name, values in models.items()
    }
    drifts = {
        line: [(time, math.log10(drift)) for time, drift in points if drift]
        for line, points in _drifts(models).items()
    }
    times = [time for points in drifts.values() for time, _ in points]
    if times:
        drifts["allowed"] = [(time, math.log10(DRIFT_TARGET)) for time in (min(times), max(times))]
    return [
        *model_tables("energy", models, drawn="max_drift"),
        lines_table("energy trajectory", "time", "energy", kept),
        lines_table("energy drift", "time", "log10 drift", drifts),
    ]


BENCHMARK = Benchmark(
    measure={"energy": measure_energy, "trained energy": measure_trained_energy},
    judge=judge,
    plot=plot,
    shown=(Metric("max_drift", "largest relative energy drift", "", {"max_drift_leapfrog": "leapfrog"}),),
    stages=FLOWING,
    # It follows the model's flow for its steps without changing what the model computes.
    # Of order 4: leapfrog, with which models train, would drift further than the potential makes it.
    workload=lambda config: Workload(4, 512, ode_steps=100, integrator="blanes_moan_rkn4"),
    tables=tables,
)
