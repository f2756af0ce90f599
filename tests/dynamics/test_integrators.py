from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from support.dynamics import (
    POTENTIALS,
    Frozen,
    Harmonic,
    HenonHeiles,
    Kepler,
    kepler_orbit,
    moved,
    perturbed_context,
    perturbed_duffing,
    perturbed_mlp,
    state,
)

from muse.dynamics import INTEGRATORS, HamiltonianNeuralODE, Potential, stages
from muse.dynamics.integrators import Stages

NAMES = list(INTEGRATORS)


def flow(potential, steps, dt, integrator, gradient="backprop", **options):
    return HamiltonianNeuralODE(potential, steps, dt, integrator, gradient, **options)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_sum_to_one(name):
    scheme = INTEGRATORS[name]
    assert len(scheme.kicks) == len(scheme.drifts)
    assert math.fsum(scheme.kicks) == pytest.approx(1, abs=1e-14)
    assert math.fsum(scheme.drifts) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 4])
def test_stages_read_the_same_backwards(name, steps):
    """To the last bit, so that a fixed-point flow goes back the way it came."""
    part = stages(name, steps, 0.3)
    # Kick, drift, kick, ...: the first or the last of them is none.
    halves = [half for stage in zip(part.kicks, part.drifts, strict=True) for half in stage]
    assert (halves[0] != 0) != (halves[-1] != 0)
    moves = [half for half in halves if half]
    assert len(moves) == len(halves) - 1
    assert moves == moves[::-1]
    assert (halves[0] == 0) == (name == "position_verlet" or name.endswith("_drift_first"))


@pytest.mark.parametrize("name", NAMES)
def test_neighbouring_halves_are_merged(name):
    scheme = INTEGRATORS[name]
    for steps in (1, 2, 10):
        part = stages(name, steps, 0.1)
        assert part.forces == steps * scheme.forces + (part.kicks[0] != 0)
        assert len(part.kicks) == len(part.drifts) == steps * scheme.forces + 1


def test_leapfrog():
    assert stages("leapfrog", 3, 0.5) == Stages((0.25, 0.5, 0.5, 0.25), (0.5, 0.5, 0.5, 0.0))
    for steps in (1, 10, 100):
        assert stages("leapfrog", steps, 0.1).forces == steps + 1


def test_position_verlet():
    assert stages("position_verlet", 3, 0.5) == Stages((0.0, 0.5, 0.5, 0.5), (0.25, 0.5, 0.5, 0.25))
    for steps in (1, 10, 100):
        assert stages("position_verlet", steps, 0.1).forces == steps


def test_forces_of_a_step():
    """What each costs, for comparisons at equal cost: as much, whether it begins with a kick or a drift."""
    forces = {name: scheme.forces for name, scheme in INTEGRATORS.items()}
    for name in NAMES:
        assert forces[name] == forces[name.removesuffix("_drift_first")]
    assert forces.pop("position_verlet") == forces["leapfrog"]
    assert {name: count for name, count in forces.items() if not name.endswith("_drift_first")} == {
        "leapfrog": 1,
        "yoshida4": 3,
        "blanes_moan4": 6,
        "blanes_moan_rkn4": 6,
        "yoshida6": 7,
        "kahan_li6": 9,
        "suzuki_umeno8": 15,
    }


@pytest.mark.parametrize("name", NAMES)
def test_steps_at_once_are_steps_one_by_one(name):
    z = state(5, 6, dtype=torch.float64)
    potential = perturbed_mlp(6).double()
    one, many = flow(potential, 1, 0.2, name), flow(potential, 7, 0.2, name)
    single = z
    for _ in range(7):
        single = moved(one, single)
    torch.testing.assert_close(moved(many, z), single, rtol=0, atol=1e-13)
    assert not torch.allclose(single, z, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_is_lost(name):
    """int(0.3 / 0.1) is 2; and 1000 steps of 0.001 are the time 1."""
    assert int(0.3 / 0.1) == 2
    for steps, dt in ((3, 0.1), (6, 0.1), (7, 0.1), (1000, 0.001)):
        part = stages(name, steps, dt)
        assert math.fsum(part.kicks) == pytest.approx(steps * dt, rel=1e-13)
        assert math.fsum(part.drifts) == pytest.approx(steps * dt, rel=1e-13)


def test_free_motion_covers_the_whole_time():
    class Free(Potential):
        def force(self, q, *coefficients):
            return torch.zeros_like(q)

    z = state(4, 3, dtype=torch.float64).requires_grad_()
    for gradient in ("backprop", "checkpoint", "reversible"):
        end = moved(flow(Free(), 3, 0.1, "leapfrog", gradient=gradient), z)
        torch.testing.assert_close(end[:, 0], z[:, 0] + 0.3 * z[:, 1])
        torch.testing.assert_close(end[:, 1], z[:, 1])
        (grad,) = torch.autograd.grad(end.sum(), z)
        torch.testing.assert_close(grad[:, 0], torch.ones(4, 3).double())
        torch.testing.assert_close(grad[:, 1], torch.full((4, 3), 1.3).double())


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_a_step(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        stages("leapfrog", steps, 0.1)


def test_unknown_integrator():
    with pytest.raises(
        ValueError, match=r"integrator=euler is not known; choose one of leapfrog, .*yoshida6"
    ):
        stages("euler", 1, 0.1)


# ---- Order of convergence, in float64


def assert_order(integrator, error, steps):
    """The error falls as steps^-order, well above rounding."""
    with torch.no_grad():
        errors = [error(count).norm().item() for count in steps]
    assert min(errors) > 1e-12
    for (coarse, fine), (few, many) in zip(
        itertools.pairwise(errors), itertools.pairwise(steps), strict=True
    ):
        found = math.log(coarse / fine) / math.log(many / few)
        assert found == pytest.approx(INTEGRATORS[integrator].order, abs=0.1), errors


@pytest.mark.parametrize("integrator", NAMES)
def test_order_on_the_harmonic_oscillator(integrator):
    time, stiffness = 5.0, 1.7
    potential = Harmonic().double()
    potential.stiffness.data.fill_(stiffness)
    z = torch.tensor([[1.0, 0.3], [0.2, -0.5]], dtype=torch.float64)
    rate = stiffness**0.5
    c, s = math.cos(rate * time), math.sin(rate * time)
    exact = torch.stack((c * z[0] + s / rate * z[1], c * z[1] - s * rate * z[0]))
    assert_order(
        integrator,
        lambda steps: moved(flow(potential, steps, time / steps, integrator), z) - exact,
        {2: (48, 64, 96), 4: (48, 64, 96), 6: (32, 48, 64), 8: (16, 24, 32)}[INTEGRATORS[integrator].order],
    )


@pytest.fixture(scope="module")
def henon_heiles():
    """A start and, by the scheme of highest order with steps so short that halving them changes nothing, the
    state after a time of 10."""
    # The energy is 1/8, between order and chaos.
    z = torch.tensor([[0.3, 0.1], [0.1, 0.35]], dtype=torch.float64)
    with torch.no_grad():
        return z, moved(flow(HenonHeiles(), 600, 10 / 600, "suzuki_umeno8"), z)


@pytest.mark.parametrize("integrator", NAMES)
def test_order_on_the_henon_heiles_system(integrator, henon_heiles):
    time, (z, exact) = 10.0, henon_heiles
    assert_order(
        integrator,
        lambda steps: moved(flow(HenonHeiles(), steps, time / steps, integrator), z) - exact,
        {2: (64, 96, 128), 4: (64, 96, 128), 6: (48, 64, 96), 8: (48, 64, 96)}[INTEGRATORS[integrator].order],
    )


@pytest.mark.parametrize("integrator", NAMES)
def test_order_on_an_eccentric_kepler_orbit(integrator):
    """It is where it was after its period of 2 pi. So many steps, that the leading error may lead."""
    steps = {2: (256, 512), 4: (512, 1024), 6: (128, 256), 8: (64, 96)}[INTEGRATORS[integrator].order]
    z = kepler_orbit(0.5)
    assert_order(
        integrator,
        lambda count: moved(flow(Kepler(), count, 2 * math.pi / count, integrator), z) - z,
        steps,
    )


# ---- Geometry


# Each with the number of channels.
SYSTEMS = {
    "henon_heiles": (HenonHeiles, 2),
    "mlp": (lambda: perturbed_mlp(4).double(), 4),
    "context": (lambda: perturbed_context(4).double(), 4),
    "duffing": (lambda: perturbed_duffing(3).double(), 3),
}


@pytest.mark.parametrize("integrator", NAMES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_time_reversal(system, integrator):
    """With p turned round the flow goes back the way it came."""
    make, width = SYSTEMS[system]
    z = state(6, width, rms=0.2, dtype=torch.float64)
    ode = flow(Frozen(make(), z), 25, 0.2, integrator)
    turn = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    end = moved(ode, z)
    assert (end - z).abs().max() > 0.1
    torch.testing.assert_close(turn * moved(ode, turn * end), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "integrator"),
    [
        *zip(itertools.cycle(POTENTIALS), NAMES),
        *itertools.product(POTENTIALS, ["leapfrog", "blanes_moan_rkn4"]),
    ],
)
def test_time_reversal_in_fixed_point_is_exact(kind, integrator):
    """Rounding is odd and the stages read the same backwards, so not a bit is lost."""
    bits = 18
    # A multiple of the unit, and less than 2^24 of them.
    z = (state(6, 8) * 2**bits).round() / 2**bits
    # The way back is in the context of the way there.
    ode = flow(Frozen(POTENTIALS[kind](8), z), 15, 0.1, integrator, "exact", fraction_bits=bits)
    turn = torch.tensor([[1.0], [-1.0]])
    with torch.no_grad():
        end = moved(ode, z)
        assert (end - z).abs().max() > 0.1
        assert torch.equal(turn * moved(ode, turn * end), z)


@pytest.mark.parametrize("integrator", NAMES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_volume_and_symplectic_form_are_preserved(system, integrator):
    make, width = SYSTEMS[system]
    z = state(width, rms=0.3, dtype=torch.float64)
    ode = flow(Frozen(make(), z), 7, 0.3, integrator)
    jacobian = torch.autograd.functional.jacobian(partial(moved, ode), z).reshape(2 * width, 2 * width)
    one = torch.eye(width, dtype=torch.float64)
    form = torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64), one)
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=0, atol=1e-12)
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-12)
    assert (jacobian - torch.eye(2 * width)).norm() > 1


def test_the_context_is_what_a_flow_preserves_no_volume_over():
    """The test above on the whole map z -> Phi(z; z): the same point, but its Jacobian is another."""
    potential, z = perturbed_context(4).double(), state(4, rms=0.3, dtype=torch.float64)
    whole, frozen = (flow(x, 7, 0.3, "leapfrog") for x in (potential, Frozen(potential, z)))
    assert torch.equal(moved(whole, z), moved(frozen, z))
    jacobians = [torch.autograd.functional.jacobian(partial(moved, ode), z) for ode in (whole, frozen)]
    sizes = [torch.linalg.det(jacobian.reshape(8, 8)) for jacobian in jacobians]
    assert abs(sizes[0] - 1) > 0.1
    assert sizes[1].item() == pytest.approx(1, abs=1e-12)


def test_a_scheme_that_is_not_symplectic_is_told_apart():
    """The test of volume, turned on Euler's method."""
    z = state(2, rms=0.3, dtype=torch.float64)

    def euler(z):
        q, p = z
        for _ in range(7):
            q, p = q + 0.3 * p, p + 0.3 * HenonHeiles().force(q)
        return torch.stack((q, p))

    jacobian = torch.autograd.functional.jacobian(euler, z).reshape(4, 4)
    assert abs(torch.linalg.det(jacobian).item() - 1) > 0.1
