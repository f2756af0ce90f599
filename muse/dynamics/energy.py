"""Energies of a flow: how well they are kept, and what explains it. All in float64, per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.planar import upcast
from kernels.symplectic import LIMIT
from muse.dynamics.hamiltonian_ode import HamiltonianNeuralODE
from muse.dynamics.integrators import Stages, stages
from muse.dynamics.potential import Potential
from muse.errors import RunError

# Relative drift that a token may have in 100 steps of 0.1.
DRIFT_TARGET = 5e-5
# A token's energy moves one way if every reversal is below this share of its range.
REVERSAL = 0.1
# Share of tokens that may do so.
MONOTONE_SHARE = 0.01
# Tokens whose hidden activations in float64 fit the cache.
CHUNK = 256


@dataclass(frozen=True)
class Trajectory:
    """What a flow went through.

    Attributes:
        energy: H (steps + 1, tokens).
        modified: the modified Hamiltonian of leapfrog, likewise, or nothing if it was not asked for; see
            ``modification``.
        q: final q (tokens, D), as the flow holds it, int32 in units of 1 / scale if ``exact``.
        p: final p, likewise.
    """

    energy: Tensor
    modified: Tensor
    q: Tensor
    p: Tensor


def energy(potential: Potential, q: Tensor, p: Tensor, context: tuple[Tensor, ...] = ()) -> Tensor:
    """H(q, p) = |p|^2 / 2 + V(q) (...,) of q and p (..., D), float64; the context is the potential's."""
    q, p = q.double(), p.double()
    rows = zip(*(x.reshape(-1, x.shape[-1]).split(CHUNK) for x in (q, *context)), strict=True)
    values = [potential(*chunk) for chunk in rows]
    return p.square().sum(-1) / 2 + torch.cat(values).view(q.shape[:-1])


def modification(
    potential: Potential, q: Tensor, p: Tensor, dt: float, context: tuple[Tensor, ...] = ()
) -> Tensor:
    """dt^2 (p V'' p / 12 - |grad V|^2 / 24), added to which leapfrog keeps H to O(dt^4).

    Hairer, Lubich and Wanner, "Geometric Numerical Integration", chapter IX. float64 (...,); V'' p is taken
    by a central difference of forces.
    """
    q, p = q.double(), p.double()
    field = _double_field(potential, context)
    force = field(q)
    length = p.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    shift = 1e-4 * p / length
    change = field(q + shift) - field(q - shift)
    bent = -(p * change).sum(-1) * (length.squeeze(-1) / 2e-4)
    return dt**2 * (bent / 12 - force.square().sum(-1) / 24)


@torch.no_grad()
def trajectory(
    flow: HamiltonianNeuralODE,
    q: Tensor,
    p: Tensor,
    steps: int,
    dt: float | None = None,
    integrator: str | None = None,
    every: int = 1,
    modified: bool = True,
) -> Trajectory:
    """Follow the tokens that start at q and p (..., D) in the arithmetic of the flow.

    Args:
        flow: the layer; its potential, and its fixed-point state if ``exact``.
        q: initial q.
        p: initial p.
        steps: number of steps.
        dt: size of a step; that of the flow if None.
        integrator: that of the flow if None.
        every: steps between two energies.
        modified: whether the modified Hamiltonian is wanted, which costs three forces in float64 each time.

    Raises:
        RunError: the state is not finite, or leaves the range of the fixed-point state.
        ValueError: ``steps`` is no multiple of ``every``.
    """
    if steps % every:
        raise ValueError(f"steps={steps} is no multiple of every={every}")
    dt = flow.dt if dt is None else dt
    potential, scale = flow.potential, 0.0 if flow.fallen_back else flow.scale
    q, p = (upcast(x).reshape(-1, x.shape[-1]) for x in (q, p))
    context = potential.context(q, p)
    coefficients = (*potential.coefficients(), *context)
    part = stages(integrator or flow.integrator, every, dt)
    energies, modifications = [], []

    def note() -> None:
        q_now, p_now = (x.double() / scale if x.dtype == torch.int32 else x for x in (q, p))
        energies.append(energy(potential, q_now, p_now, context))
        if modified:
            modifications.append(modification(potential, q_now, p_now, dt, context))

    note()
    for done in range(every, steps + 1, every):
        q, p, peak = potential.advance(q, p, coefficients, part, scale)
        if not peak.item() < (LIMIT if scale else math.inf):
            raise RunError(
                f"{flow.name}: the state is not finite, or too large for stage.fraction_bits, by step {done}"
            )
        note()
    kept = torch.stack(energies)
    return Trajectory(kept, kept + torch.stack(modifications) if modified else kept[:0], q, p)


def halves(integrator: str, dt: float) -> list[tuple[str, Stages]]:
    """The kicks and drifts of one step of size ``dt``, in turn, each by its name."""
    step = stages(integrator, 1, dt)
    both = [
        half
        for kick, drift in zip(step.kicks, step.drifts, strict=True)
        for half in (("kick", kick, 0.0), ("drift", 0.0, drift))
    ]
    return [(name, Stages((kick,), (drift,))) for name, kick, drift in both if kick or drift]


@torch.no_grad()
def energies_by_halves(flow: HamiltonianNeuralODE, q: Tensor, p: Tensor) -> Tensor:
    """H of tokens that start at q and p (tokens, D), through the flow's own steps in its arithmetic.

    Within a step q and p are not of the same time, so that what H swings by there is no drift.

    Returns:
        float64 (1 + steps len(``halves``), tokens): at the start, and after every kick and drift. After each
        ``len(halves)`` of them a step is done.

    Raises:
        RunError: the state is not finite, or leaves the range of the fixed-point state.
    """
    potential, scale = flow.potential, 0.0 if flow.fallen_back else flow.scale
    q, p = upcast(q), upcast(p)
    context = potential.context(q, p)
    coefficients = (*potential.coefficients(), *context)
    energies = [energy(potential, q, p, context)]
    for _, half in flow.steps * halves(flow.integrator, flow.dt):
        q, p, peak = potential.advance(q, p, coefficients, half, scale)
        if not peak.item() < (LIMIT if scale else math.inf):
            raise RunError(f"{flow.name}: the state is not finite, or too large for stage.fraction_bits")
        energies.append(energy(potential, q.double() / (scale or 1), p.double() / (scale or 1), context))
    return torch.stack(energies)


def drift(energies: Tensor) -> Tensor:
    """max over time of |E_t - E_0| / |E_0| of each token (tokens,), from energies (time, tokens)."""
    return (energies - energies[0]).abs().amax(0) / energies[0].abs()


def monotone_share(energies: Tensor) -> float:
    """Share of tokens whose energy (time, tokens) moves one way but for small reversals."""
    reach = energies.amax(0) - energies.amin(0)
    falls = (energies.cummax(0).values - energies).amax(0)
    rises = (energies - energies.cummin(0).values).amax(0)
    one_way = torch.minimum(falls, rises) < REVERSAL * reach
    return one_way.double().mean().item()


def curvature(
    potential: Potential, q: Tensor, context: tuple[Tensor, ...] = (), iterations: int = 30
) -> Tensor:
    """The largest |eigenvalue| of V'' at each q (tokens, D), by power iteration; float64 (tokens,).

    V'' v is the gradient of -F v, since V'' is symmetric: one pass back through one force.
    """
    with torch.enable_grad():
        q = q.detach().double().requires_grad_()
        force = _double_field(potential, context)(q)
    generator = torch.Generator(device=q.device).manual_seed(0)
    v = torch.randn(q.shape, generator=generator, dtype=q.dtype, device=q.device)
    size = q.new_zeros(len(q))
    # A constant force depends on nothing.
    for _ in range(iterations if force.requires_grad else 0):
        v = v / v.norm(dim=-1, keepdim=True)
        (change,) = torch.autograd.grad(force, q, v, retain_graph=True)
        v = -change
        size = v.norm(dim=-1)
        v = torch.where(size[:, None] > 0, v, torch.ones_like(v))
    return size


def _double_field(potential: Potential, context: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    return potential.field(*(x.detach().double() for x in (*potential.coefficients(), *context)))
