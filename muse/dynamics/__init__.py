"""Hamiltonian dynamics of the hidden state."""

from muse.dynamics.hamiltonian_ode import HamiltonianNeuralODE, agree_on_fallbacks, flow_metrics
from muse.dynamics.integrators import INTEGRATORS, Splitting, Stages, stages
from muse.dynamics.potential import DuffingPotential, MLPPotential, Potential

__all__ = [
    "INTEGRATORS",
    "DuffingPotential",
    "HamiltonianNeuralODE",
    "MLPPotential",
    "Potential",
    "Splitting",
    "Stages",
    "agree_on_fallbacks",
    "flow_metrics",
    "stages",
]
