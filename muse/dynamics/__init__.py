"""Hamiltonian dynamics of the hidden state."""

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
from muse.dynamics.integrators import INTEGRATORS, stages
from muse.dynamics.potential import DuffingPotential, MLPPotential, Potential
from muse.dynamics.watch import recorded_flows, watched_flows

__all__ = [
    "INTEGRATORS",
    "DuffingPotential",
    "FallsBack",
    "HamiltonianNeuralODE",
    "MLPPotential",
    "Potential",
    "agree_on_fallbacks",
    "deferred_checks",
    "flow_metrics",
    "flows_of",
    "layers_that_fall_back",
    "recorded_flows",
    "stages",
    "take_reconstruction_error",
    "watched_flows",
]
