"""Symplectic splitting schemes for separable Hamiltonians H = T(p) + V(q), from one table.

A step of dt is a list of stages, each a kick and a drift: p += kick dt F(q), then q += drift dt p. All
schemes are symmetric in time. A scheme that begins with a drift and ends with one has a name in
``drift_first``, but position Verlet, leapfrog's. The formulas are from

- Yoshida, "Construction of higher order symplectic integrators", Phys. Lett. A 150, 1990;
- Kahan and Li, "Composition constants for raising the orders of unconventional schemes", Math. Comp. 66,
  1997;
- Blanes and Moan, "Practical symplectic partitioned Runge-Kutta and Runge-Kutta-Nystroem methods",
  J. Comput. Appl. Math. 142, 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Splitting:
    """The coefficients of one step of size 1.

    Attributes:
        order: order of convergence.
        kicks: coefficients of the kicks.
        drifts: coefficients of the drifts, as many; each sums to 1.
    """

    order: int
    kicks: tuple[float, ...]
    drifts: tuple[float, ...]

    @property
    def forces(self) -> int:
        """Forces of a step; the last of a step is the first of the next where a step begins with a kick."""
        return sum(kick != 0 for kick in self.kicks) - (self.kicks[0] != 0)


@dataclass(frozen=True)
class Stages:
    """What a flow runs: stage k is p += kicks[k] F(q), then q += drifts[k] p; a 0 leaves its half out."""

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]

    @property
    def forces(self) -> int:
        """Forces of the whole flow."""
        return sum(kick != 0 for kick in self.kicks)


def _composed(sizes: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Leapfrog steps of these sizes, neighbouring half kicks merged."""
    kicks = [sizes[0] / 2, *((a + b) / 2 for a, b in pairwise(sizes)), sizes[-1] / 2]
    return tuple(kicks), (*sizes, 0.0)


def _symmetric(half: Sequence[float]) -> list[float]:
    """Sizes that read the same backwards and sum to 1; the one in the middle is what is left."""
    return [*half, 1 - 2 * sum(half), *reversed(half)]


def _kick_first(
    kicks: Sequence[float], drifts: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A symmetric scheme that begins and ends with a kick, from its first half; the middle one is a kick."""
    half = [*drifts, 0.5 - sum(drifts)]
    return tuple(_symmetric(kicks)), (*half, *reversed(half), 0.0)


def _drift_first(scheme: Splitting) -> Splitting:
    """The scheme with kicks and drifts in each other's places, for one that keeps its order."""
    return Splitting(scheme.order, (0.0, *scheme.drifts[:-1]), scheme.kicks)


_YOSHIDA_4 = 1 / (2 - 2 ** (1 / 3))

INTEGRATORS = {
    "leapfrog": Splitting(2, *_composed([1.0])),
    "yoshida4": Splitting(4, *_composed(_symmetric([_YOSHIDA_4]))),
    # S6: six stages, made for any separable Hamiltonian.
    "blanes_moan4": Splitting(
        4,
        *_kick_first(
            [0.0792036964311957, 0.353172906049774, -0.0420650803577195],
            [0.209515106613362, -0.143851773179818],
        ),
    ),
    # SRKN6b: six stages, needs a kinetic energy quadratic in p.
    "blanes_moan_rkn4": Splitting(
        4,
        *_kick_first(
            [0.0829844064174052, 0.396309801498368, -0.0390563049223486],
            [0.245298957184271, 0.604872665711080],
        ),
    ),
    "yoshida6": Splitting(
        6, *_composed(_symmetric([0.784513610477557264, 0.235573213359358134, -1.177679984178871007]))
    ),
    "kahan_li6": Splitting(
        6,
        *_composed(
            _symmetric(
                [
                    0.39216144400731413928,
                    0.33259913678935943860,
                    -0.70624617255763935981,
                    0.082213596293550800230,
                ]
            )
        ),
    ),
    # Fifteen stages (Suzuki and Umeno 1993).
    "suzuki_umeno8": Splitting(
        8,
        *_composed(
            _symmetric(
                [
                    0.74167036435061295345,
                    -0.40910082580003159400,
                    0.19075471029623837995,
                    -0.57386247111608226666,
                    0.29906418130365592384,
                    0.33462491824529818378,
                    0.31529309239676659663,
                ]
            )
        ),
    ),
}
# A Runge-Kutta-Nystroem scheme has no such twin: its order needs a kinetic energy quadratic in p.
INTEGRATORS |= {
    "position_verlet" if name == "leapfrog" else f"{name}_drift_first": _drift_first(scheme)
    for name, scheme in INTEGRATORS.items()
    if name != "blanes_moan_rkn4"
}


def stages(integrator: str, steps: int, dt: float) -> Stages:
    """The stages of ``steps`` steps of size ``dt``; the last half of a step is one with the next's first.

    Raises:
        ValueError: the integrator is not known, or there is no step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if integrator not in INTEGRATORS:
        raise ValueError(f"integrator={integrator} is not known; choose one of {', '.join(INTEGRATORS)}")
    step = INTEGRATORS[integrator]
    kicks, drifts = list(step.kicks), list(step.drifts)
    for _ in range(steps - 1):
        kicks[-1] += step.kicks[0]
        drifts[-1] += step.drifts[0]
        kicks += step.kicks[1:]
        drifts += step.drifts[1:]
    return Stages(tuple(dt * kick for kick in kicks), tuple(dt * drift for drift in drifts))
