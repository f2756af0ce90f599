"""Hamiltonian dynamics of the hidden state."""

from muse.dynamics.energy import Trajectory, drift, energy, monotone_share, trajectory
from muse.dynamics.hamiltonian_ode import (
    HamiltonianNeuralODE,
    agree_on_fallbacks,
    deferred_checks,
    flow_metrics,
    flows_of,
    take_reconstruction_error,
)
from muse.dynamics.integrators import INTEGRATORS, Splitting, Stages, stages
from muse.dynamics.potential import DuffingPotential, MLPPotential, Potential
from muse.dynamics.watch import watched_flows

__all__ = [
    "INTEGRATORS",
    "DuffingPotential",
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
    "monotone_share",
    "stages",
    "take_reconstruction_error",
    "trajectory",
    "watched_flows",
]
