from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.dynamics import (
    POTENTIALS,
    Harmonic,
    HenonHeiles,
    moved,
    no_warnings,
    perturbed_duffing,
    perturbed_mlp,
    some_context,
    state,
)

from muse.config import StageConfig, WidthConfig
from muse.dynamics import HamiltonianNeuralODE, MLPPotential
from muse.dynamics.energy import (
    curvature,
    drift,
    energies_by_halves,
    energy,
    halves,
    modification,
    monotone_share,
    trajectory,
)
from muse.dynamics.integrators import INTEGRATORS
from muse.errors import RunError
from muse.models.hamiltonian import flow_potential

# ---- Measures of a series


def test_drift_is_that_of_the_worst_moment_of_each_token():
    energies = torch.tensor([[2.0, -4.0, 1.0], [2.1, -4.0, 1.0], [1.7, -3.0, 1.0], [2.0, -4.0, 1.0]])
    torch.testing.assert_close(drift(energies), torch.tensor([0.15, 0.25, 0.0]))


def series(*tokens):
    return torch.tensor(tokens, dtype=torch.float64).T


RISING = [0.0, 1.0, 2.0, 3.0, 4.0]
SWINGING = [0.0, 1.0, 0.0, -1.0, 0.0]
# Back by 5 % and by 20 % of the range on the way.
NEARLY = [0.0, 0.5, 0.45, 0.8, 1.0]
HARDLY = [0.0, 0.5, 0.3, 0.8, 1.0]


@pytest.mark.parametrize(
    ("token", "one_way"),
    [
        (RISING, True),
        ([-x for x in RISING], True),
        ([5.0 + x for x in RISING], True),
        (SWINGING, False),
        (NEARLY, True),
        ([-x for x in NEARLY], True),
        (HARDLY, False),
        ([-x for x in HARDLY], False),
        # Reversals add up where they follow each other, not where it rises again in between.
        ([0.0, 0.5, 0.44, 0.38, 1.0], False),
        ([0.0, 0.5, 0.44, 0.7, 0.64, 1.0], True),
        # Constant: it moves no way.
        ([1.0, 1.0, 1.0], False),
        # Up and back again.
        ([0.0, 1.0, 2.0, 1.0, 0.0], False),
    ],
)
def test_one_way(token, one_way):
    assert monotone_share(series(token)) == float(one_way)


def test_share_of_tokens_that_move_one_way():
    assert monotone_share(series(RISING, SWINGING, SWINGING, SWINGING)) == 0.25
    assert monotone_share(series(RISING, SWINGING, NEARLY, HARDLY)) == 0.5
    assert monotone_share(series(SWINGING)) == 0.0


def test_a_random_walk_is_not_all_one_way_and_a_drifting_one_is():
    noise = torch.randn(100, 2000, dtype=torch.float64)
    assert monotone_share(noise) == 0.0
    assert monotone_share(noise + torch.arange(100)[:, None]) == 1.0


# ---- Energies


def test_energy_by_hand():
    potential = Harmonic(3.0)
    q, p = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 4.0], [2.0, 2.0]])
    torch.testing.assert_close(
        energy(potential, q, p), torch.tensor([7.5 + 8.0, 1.5 + 4.0], dtype=torch.float64)
    )


def test_energy_of_the_mlp_by_hand():
    """Softplus is log(1 + e^a), and the sign of a weight does not count."""
    potential = MLPPotential(1, 2, phi="softplus")
    with torch.no_grad():
        potential.w1.copy_(torch.tensor([[1.0], [-2.0]]))
        potential.b1.copy_(torch.tensor([0.5, 0.0]))
        potential.w2.copy_(torch.tensor([1.0, -3.0]))
    found = energy(potential, torch.tensor([[0.25]]), torch.tensor([[2.0]]))
    expected = 2.0 + math.log1p(math.exp(0.75)) + 3 * math.log1p(math.exp(-0.5))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", POTENTIALS)
def test_energy_of_any_shape(kind):
    potential = POTENTIALS[kind](6)
    # More tokens than are taken at a time.
    q, p = torch.randn(2, 3, 105, 6)
    context = some_context(potential, q)
    whole = energy(potential, q, p, context)
    assert whole.dtype == torch.float64
    assert whole.shape == (3, 105)
    # Forces in float32 have a bias in float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if context else {}
    alone = energy(potential, q[1, 2], p[1, 2], tuple(x[1, 2] for x in context))
    torch.testing.assert_close(whole[1, 2], alone, **tolerance)
    # As its parts, with the parameters in float64 as well.
    parts = p.double().square().sum(-1) / 2 + potential.double()(q.double(), *context)
    torch.testing.assert_close(whole, parts, **tolerance)


def test_energy_of_half_precision_forces_is_that_of_their_weights():
    """The potential whose force is taken, so that drift is not what the weights lost."""
    potential, q = MLPPotential(8, 32, force_precision="bf16"), torch.randn(5, 8)
    rounded = MLPPotential(8, 32)
    rounded.load_state_dict({name: x.bfloat16().float() for name, x in potential.state_dict().items()})
    torch.testing.assert_close(energy(potential, q, q), energy(rounded, q, q))


def hessians(potential, q, context=()):
    """V'' at every token in its context."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda x, given=given: potential(x, *given), token)
            for token, *given in zip(q, *context, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", POTENTIALS)
def test_modification_by_hand(kind):
    potential = POTENTIALS[kind](6).double()
    q, p = torch.randn(2, 7, 6, dtype=torch.float64)
    dt = 0.3
    leaf = q.clone().requires_grad_()
    context = some_context(potential, q)
    (slope,) = torch.autograd.grad(potential(leaf, *context).sum(), leaf)
    bent = torch.einsum("ti,tij,tj->t", p, hessians(potential, q, context), p)
    expected = dt**2 * (bent / 12 - slope.square().sum(-1) / 24)
    torch.testing.assert_close(modification(potential, q, p, dt, context), expected, rtol=0, atol=1e-8)
    # A token at rest has no direction.
    assert modification(potential, q, 0 * p, dt, context).isfinite().all()


@pytest.mark.parametrize("kind", POTENTIALS)
def test_curvature_is_the_largest_eigenvalue(kind):
    potential = POTENTIALS[kind](12).double()
    q = torch.randn(20, 12, dtype=torch.float64)
    context = some_context(potential, q)
    largest = torch.linalg.eigvalsh(hessians(potential, q, context)).abs().amax(-1)
    found = curvature(potential, q, context, iterations=1000)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, largest, rtol=1e-5, atol=0)


def test_curvature_counts_negative_eigenvalues():
    potential = perturbed_duffing(3).double()
    with torch.no_grad():
        potential.stiffness.copy_(torch.tensor([1.0, -3.0, 2.0]))
    found = curvature(potential, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not curvature(Harmonic(0.0), torch.zeros(2, 3)).any()


# ---- Trajectories


@pytest.mark.parametrize("gradient", ["exact", "backprop"])
@pytest.mark.parametrize("kind", POTENTIALS)
def test_trajectory_is_what_the_flow_does(kind, gradient):
    flow = HamiltonianNeuralODE(POTENTIALS[kind](8), 12, 0.1, "leapfrog", gradient)
    z = state(2, 3, 8)
    taken = trajectory(flow, *z.unbind(-2), 12)
    with torch.no_grad():
        ends = moved(flow, z).flatten(0, 1)
    assert taken.energy.shape == taken.modified.shape == (13, 6)
    assert taken.q.shape == taken.p.shape == (6, 8)
    assert taken.q.dtype == (torch.int32 if gradient == "exact" else torch.float32)
    for held, end in zip((taken.q, taken.p), ends.unbind(-2), strict=True):
        torch.testing.assert_close((held / (flow.scale or 1.0)).float(), end, rtol=0, atol=4e-6)
    starts = z.flatten(0, 1)
    context = flow.potential.context(*starts.unbind(-2))
    for found, z_now in ((taken.energy[0], starts), (taken.energy[-1], ends)):
        now = energy(flow.potential, *z_now.unbind(-2), context)
        torch.testing.assert_close(found, now, rtol=0, atol=3e-5)
    added = modification(flow.potential, *starts.unbind(-2), 0.1, context)
    torch.testing.assert_close(taken.modified[0], taken.energy[0] + added, rtol=0, atol=3e-5)


def test_trajectory_in_fixed_point_ends_in_the_very_state():
    """In steps of one or of four: stages are merged within them, so the same integers need the same parts."""
    flow = HamiltonianNeuralODE(perturbed_mlp(8), 12, 0.1, "leapfrog")
    z = state(5, 8)
    every, fourth = trajectory(flow, *z.unbind(-2), 12), trajectory(flow, *z.unbind(-2), 12, every=4)
    assert fourth.energy.shape == (4, 5)
    torch.testing.assert_close(fourth.energy, every.energy[::4], rtol=0, atol=2e-5)
    end = flow.potential.advance(*z.unbind(-2), flow.potential.coefficients(), flow.stages, flow.scale)
    whole = trajectory(flow, *z.unbind(-2), 12, every=12)
    assert torch.equal(whole.q, end[0])
    assert torch.equal(whole.p, end[1])


def test_trajectory_by_other_means():
    flow = HamiltonianNeuralODE(perturbed_mlp(8).double(), 5, 0.1, "leapfrog", "backprop")
    z = state(5, 8, dtype=torch.float64)
    taken = trajectory(flow, *z.unbind(-2), 20, dt=0.05, integrator="yoshida6")
    other = HamiltonianNeuralODE(flow.potential, 20, 0.05, "yoshida6", "backprop")
    torch.testing.assert_close(
        torch.stack((taken.q, taken.p), -2), moved(other, z).detach(), rtol=0, atol=1e-13
    )
    assert taken.q.dtype == torch.float64
    assert not taken.energy.requires_grad


def test_trajectory_needs_whole_parts():
    with pytest.raises(ValueError, match="steps=10 is no multiple of every=3"):
        trajectory(HamiltonianNeuralODE(Harmonic()), *state(5, 8).unbind(-2), 10, every=3)


@pytest.mark.parametrize("gradient", ["exact", "backprop"])
@pytest.mark.parametrize("kind", POTENTIALS)
def test_trajectory_of_a_state_that_is_not_finite(kind, gradient):
    """No energies are made up of what the fixed-point state takes for 0."""
    flow = HamiltonianNeuralODE(POTENTIALS[kind](8), gradient=gradient, name="layer 1")
    z = state(5, 8)
    z[3, 0, 2] = math.nan
    with pytest.raises(RunError, match=r"layer 1: the state is not finite, .* by step 1"):
        trajectory(flow, *z.unbind(-2), 5)


def test_trajectory_out_of_range():
    flow, z = HamiltonianNeuralODE(perturbed_mlp(8), fraction_bits=29), state(5, 8)
    z[3, 0, 2] = 5.0
    with pytest.raises(RunError, match=r"too large for stage.fraction_bits, by step 1"):
        trajectory(flow, *z.unbind(-2), 5)
    # A layer that has fallen back computes in floating point.
    with pytest.warns(UserWarning, match="left the range"):
        moved(flow, z)
    taken = trajectory(flow, *z.unbind(-2), 5)
    assert taken.q.dtype == torch.float32
    assert drift(taken.energy).max() < 1e-4


# ---- How energy is kept


def scaling(series, halvings):
    """The powers of dt by which a drift falls."""
    return [
        math.log2(coarse / fine) for coarse, fine in itertools.pairwise(series(i) for i in range(halvings))
    ]


@pytest.mark.parametrize("kind", ["mlp", "confined_context", "duffing"])
def test_energy_errors_scale_as_they_should(kind):
    """In float64, over a time of 6: that of leapfrog as dt^2, that of its modified Hamiltonian as dt^4."""
    flow = HamiltonianNeuralODE(POTENTIALS[kind](16).double(), gradient="backprop")
    z = state(10, 16, dtype=torch.float64)

    def worst(integrator, which):
        def measure(i):
            taken = trajectory(flow, *z.unbind(-2), 40 * 2**i, 0.15 / 2**i, integrator, every=2**i)
            return drift(getattr(taken, which)).max().item()

        return scaling(measure, 3)

    for integrator, which, power in (
        ("leapfrog", "energy", 2),
        ("leapfrog", "modified", 4),
        ("yoshida4", "energy", 4),
        ("yoshida6", "energy", 6),
    ):
        found = worst(integrator, which)
        assert found[-1] == pytest.approx(power, abs=0.15), (integrator, which, found)


def test_energy_does_not_drift_away():
    """The error of a long flow is that of a short one: it swings, as that of Euler's method does not."""
    flow = HamiltonianNeuralODE(HenonHeiles(), gradient="backprop", integrator="leapfrog")
    z = torch.tensor([[[0.3, 0.1], [0.1, 0.35]]], dtype=torch.float64)
    energies = trajectory(flow, *z.unbind(-2), 2000, 0.1, every=4).energy
    assert drift(energies).item() < 1.2 * drift(energies[:100]).item() < 1e-2
    assert monotone_share(energies) == 0.0


@pytest.mark.parametrize("options", [{}, {"context": False}, {"context": False, "confinement": 0.0}])
def test_energy_of_a_model_at_its_defaults(options):
    """The criteria of stage 2 hold with room to spare, per token, in the arithmetic of training."""
    stage = StageConfig(number="2", potential_width=384, **options)
    potential = flow_potential(WidthConfig(d_model=96, heads=4, kv_heads=4, d_ff=384), stage)
    assert potential.with_context == stage.context
    assert potential.confinement == stage.confinement
    flow = HamiltonianNeuralODE(potential, 10, 0.1, "blanes_moan_rkn4", "exact")
    z = state(128, 96)
    with no_warnings():
        taken = trajectory(flow, *z.unbind(-2), 100, modified=False)
    drifts = drift(taken.energy)
    assert drifts.shape == (128,)
    assert 0 < drifts.max() < (1e-6 if stage.confinement else 1e-5)
    assert monotone_share(taken.energy) <= 0.01
    # It moves, and leapfrog is worse, by the curvature.
    q = z[:, 0]
    assert (taken.q.double() / flow.scale - q).abs().max() > 0.5
    leapfrog = drift(trajectory(flow, *z.unbind(-2), 100, integrator="leapfrog", modified=False).energy).max()
    bend = curvature(potential, q, potential.context(q, z[:, 1])).max() * 0.1**2
    assert 10 * drifts.max() < leapfrog < bend


# ---- Kicks and drifts


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_kicks_and_drifts_take_turns_and_make_a_whole_step(integrator):
    found = halves(integrator, 0.5)
    names = [name for name, _ in found]
    assert all(first != second for first, second in itertools.pairwise(names))
    for name, part in (("kick", "kicks"), ("drift", "drifts")):
        sizes = [getattr(half, part)[0] for _, half in found]
        assert [size != 0 for size in sizes] == [own == name for own in names]
        assert sum(sizes) == pytest.approx(0.5)


@pytest.mark.parametrize("gradient", ["exact", "backprop"])
@pytest.mark.parametrize("integrator", ["leapfrog", "position_verlet", "blanes_moan_rkn4"])
@pytest.mark.parametrize("kind", POTENTIALS)
def test_whole_steps_have_the_energies_of_a_trajectory(kind, integrator, gradient):
    torch.manual_seed(0)
    flow = HamiltonianNeuralODE(POTENTIALS[kind](6), 3, 0.2, integrator, gradient)
    q, p = torch.randn(2, 5, 6)
    kept = energies_by_halves(flow, q, p)
    each = len(halves(integrator, 0.2))
    assert kept.shape == (1 + 3 * each, 5)
    wanted = trajectory(flow, q, p, 3, modified=False).energy
    torch.testing.assert_close(kept[::each], wanted, rtol=1e-6, atol=1e-6)


def test_a_lost_state_of_a_half_step_is_told():
    flow = HamiltonianNeuralODE(Harmonic(), 1, 0.1, "leapfrog", "exact", fraction_bits=28, name="layer 1")
    with pytest.raises(RunError, match="layer 1: the state is not finite, or too large"):
        energies_by_halves(flow, torch.full((1, 2), 9.0), torch.zeros(1, 2))
