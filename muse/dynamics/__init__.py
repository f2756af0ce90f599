"""Hamiltonian dynamics of the hidden state."""

from muse.dynamics.energy import Trajectory, drift, energy, monotone_share, trajectory
from muse.dynamics.fallback import (
    FallsBack,
    agree_on_fallbacks,
    deferred_checks,
    layers_that_fall_back,
)
from muse.dynamics.hamiltonian_ode import (
    HamiltonianNeuralODE,
    flow_metrics,
    flows_of,
    take_reconstruction_error,
)
from muse.dynamics.integrators import INTEGRATORS, Splitting, Stages, stages
from muse.dynamics.potential import DuffingPotential, MLPPotential, Potential
from muse.dynamics.watch import recorded_flows, watched_flows

__all__ = [
    "INTEGRATORS",
    "DuffingPotential",
    "FallsBack",
    "HamiltonianNeuralODE",
    "MLPPotential",
    "Potential",
    "Splitting",
    "Stages",
    "Trajectory",
    "agree_on_fallbacks",
    "deferred_checks",
    "drift",
    "energy",
    "flow_metrics",
    "flows_of",
    "layers_that_fall_back",
    "monotone_share",
    "recorded_flows",
    "stages",
    "take_reconstruction_error",
    "trajectory",
    "watched_flows",
]
