from __future__ import annotations

import itertools

import pytest
import torch
from support.dynamics import (
    POTENTIALS,
    Harmonic,
    HenonHeiles,
    Kepler,
    UniformField,
    in_double,
    moved,
    perturbed_context,
    perturbed_mlp,
    relative_error,
    some_context,
    state,
)

from kernels import symplectic
from muse.dynamics import DuffingPotential, HamiltonianNeuralODE, MLPPotential, Potential, stages

PHIS = ("gelu_integral", "silu", "gelu", "softplus")
ALL = [
    *(pytest.param(lambda phi=phi: perturbed_mlp(6, 20, phi=phi), id=phi) for phi in PHIS),
    *(pytest.param(lambda phi=phi: perturbed_context(6, 20, phi=phi), id=f"context_{phi}") for phi in PHIS),
    pytest.param(lambda: POTENTIALS["duffing"](6), id="duffing"),
    pytest.param(lambda: Harmonic(1.3), id="harmonic"),
    pytest.param(Kepler, id="kepler"),
    pytest.param(lambda: UniformField(6), id="uniform"),
]


@pytest.mark.parametrize("make", ALL)
def test_force_is_minus_the_gradient_of_the_potential(make):
    potential = make().double()
    q = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    context = some_context(potential, q)
    (slope,) = torch.autograd.grad(potential(q, *context).sum(), q)
    force = potential.force(q.detach(), *potential.coefficients(), *context).detach()
    torch.testing.assert_close(force, -slope)
    # And by finite differences.
    with torch.no_grad():
        steps = 1e-5 * torch.eye(6, dtype=torch.float64).unsqueeze(1)
        change = torch.stack(
            [potential(q + step, *context) - potential(q - step, *context) for step in steps]
        )
    torch.testing.assert_close(force, -change.T / 2e-5, rtol=1e-6, atol=1e-8)


def test_force_of_henon_heiles():
    potential = HenonHeiles()
    q = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(potential(q).sum(), q)
    torch.testing.assert_close(potential.force(q), -slope)


@pytest.mark.parametrize("make", ALL)
def test_shapes_and_precision(make):
    """Of a token alone or many, in the precision of the state."""
    potential = make()
    for shape in ((6,), (4, 6), (2, 3, 6)):
        q = torch.randn(shape)
        context = some_context(potential, q)
        value, force = potential(q, *context), potential.force(q, *potential.coefficients(), *context)
        assert value.shape == shape[:-1]
        assert force.shape == shape
        assert value.dtype == force.dtype == torch.float32
        assert potential(q.double(), *context).dtype == torch.float64


@pytest.mark.parametrize("make", ALL)
def test_each_token_by_itself(make):
    potential = make().double()
    q = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    context = tuple(x.requires_grad_() for x in some_context(potential, q))
    for slope in torch.autograd.grad(potential(q, *context)[3], (q, *context)):
        assert slope[3].norm() > 0
        assert not slope[torch.arange(9) != 3].any()


@pytest.mark.parametrize(
    ("with_context", "phi", "precision"),
    [
        *zip(itertools.repeat(False), PHIS, itertools.cycle(["fp32", "bf16", "fp16"])),
        *zip(itertools.repeat(True), PHIS, itertools.cycle(["bf16", "fp16", "fp32"])),
    ],
)
def test_mlp_is_never_negative(with_context, phi, precision):
    """Whatever the signs of the weights: so the flow is bound, and relative drifts mean something."""
    potential = MLPPotential(5, 40, phi=phi, force_precision=precision, with_context=with_context)
    with torch.no_grad():
        potential.w2.normal_()
        potential.b1.normal_()
    assert potential.w2.min() < 0
    q = torch.randn(4000, 5, dtype=torch.float64) * torch.logspace(-3, 3, 4000, dtype=torch.float64)[:, None]
    values = potential(q, *some_context(potential, q))
    assert values.isfinite().all()
    assert values.min() >= 0


@pytest.mark.parametrize("phi", PHIS)
def test_phi_is_measured_from_its_lowest_value(phi):
    """One unit, q from -10 to 10: the lowest V is 0 (softplus falls to it only in the limit)."""
    potential = MLPPotential(1, 1, phi=phi).double()
    with torch.no_grad():
        potential.w1.fill_(1)
        potential.w2.fill_(1)
    lowest = potential(torch.linspace(-10, 10, 200_001, dtype=torch.float64)[:, None]).min().item()
    assert 0 <= lowest < (1e-4 if phi in ("softplus", "gelu_integral") else 1e-8)


def mean_curvature(potential, q, p):
    """The mean of tr V'' / D over tokens at the start of their flows, by differentiating forces."""
    total = 0.0
    for token, momentum in zip(q, p, strict=True):
        coefficients = (*potential.coefficients(), *potential.context(token, momentum))
        jacobian = torch.autograd.functional.jacobian(
            lambda x, given=coefficients: -potential.force(x, *given), token
        )
        total += jacobian.trace().item() / len(token)
    return total / len(q)


@pytest.mark.parametrize("curvature", [0.02, 1.0])
@pytest.mark.parametrize("with_context", [False, True])
def test_initial_curvature(with_context, curvature):
    potential = MLPPotential(48, 192, curvature=curvature, with_context=with_context).double()
    assert (potential.w2 >= 0).all()
    assert not potential.b1.any()
    z = state(8, 48, dtype=torch.float64)
    assert mean_curvature(potential, *z.unbind(-2)) == pytest.approx(curvature, rel=0.1)


def test_duffing_starts_as_a_spring_that_hardens():
    potential = DuffingPotential(3).double()
    q = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    assert potential(q).item() == pytest.approx((4 + 1) / 2 + 0.01 * (16 + 1) / 4)
    torch.testing.assert_close(
        potential.force(q, *potential.coefficients()), torch.tensor([-2.08, 0.0, 1.01], dtype=torch.float64)
    )
    # And still does where training made the coefficient negative.
    with torch.no_grad():
        potential.quartic.neg_()
    assert potential(q).item() == pytest.approx((4 + 1) / 2 + 0.01 * (16 + 1) / 4)


# ---- The path of a class (the kernel or, with a context, chunk by chunk) against that of the base class


def flown(path, potential, z, part, scale):
    """Initial state, final state and gradients of z and the coefficients, by a path: advance and undo."""
    advance, undo = path
    q, p = z.unbind(-2)
    coefficients = (*potential.coefficients(), *potential.context(q, p))
    end_q, end_p, peak = advance(potential, q, p, coefficients, part, scale)
    grad_q, grad_p = torch.randn(2, *q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    start_q, start_p, *grads = undo(potential, grad_q, grad_p, end_q, end_p, coefficients, part, scale)
    return (start_q, start_p), (end_q, end_p), peak, grads


KERNEL = MLPPotential.advance, MLPPotential.undo
PLAIN = Potential.advance, Potential.undo
every_mlp = pytest.mark.parametrize("kind", ["mlp", "context"])


@pytest.mark.parametrize(
    ("precision", "stored", "scale"),
    [
        ("fp32", torch.float32, 2.0**22),
        ("bf16", torch.float32, 0.0),
        ("fp32", torch.bfloat16, 0.0),
        ("bf16", torch.bfloat16, 2.0**22),
    ],
    ids=str,
)
@every_mlp
def test_kernel_agrees_with_the_plain_path(kind, precision, scale, stored):
    potential = POTENTIALS[kind](24, 48, force_precision=precision).to(stored)
    z, part = state(40, 24), stages("yoshida4", 5, 0.1)
    starts, ends, peak, grads = flown(KERNEL, potential, z, part, scale)
    plain_starts, plain_ends, plain_peak, plain_grads = flown(PLAIN, potential, z, part, scale)
    unit = scale or 1.0
    # Products of bfloat16 round where they like; those of float32 differ in the order of their sums.
    tolerance = 1e-2 if precision == "bf16" else 1e-5
    for x, y in zip(ends, plain_ends, strict=True):
        assert x.dtype == y.dtype == (torch.int32 if scale else torch.float32)
        torch.testing.assert_close(x.double() / unit, y.double() / unit, rtol=0, atol=tolerance)
    assert peak.dtype == plain_peak.dtype == torch.float32
    if scale:
        assert peak.item() == pytest.approx(plain_peak.item(), rel=tolerance)
    for x, y, given in zip(starts, plain_starts, z.unbind(-2), strict=True):
        assert x.dtype == y.dtype
        if scale:
            assert torch.equal(x, y)
            assert torch.equal(x, symplectic.fixed_point(given, scale))
        else:
            # On the way back a last bit of q may round to another bfloat16.
            torch.testing.assert_close(x, given, rtol=0, atol=tolerance)
            torch.testing.assert_close(y, given, rtol=0, atol=tolerance)
    # Gradients are rounded as they are stored.
    tolerance = max(tolerance, 1e-2 if stored == torch.bfloat16 else 0)
    wanted = [torch.float32, torch.float32, stored, stored, stored]
    if kind == "context":
        wanted += [stored, torch.float32]
    for x, y, dtype in zip(grads, plain_grads, wanted, strict=True):
        assert x.dtype == y.dtype == dtype
        assert x.shape == y.shape
        assert relative_error(x, y.double()) < tolerance


@pytest.mark.parametrize("path", [KERNEL, PLAIN], ids=["kernel", "plain"])
@pytest.mark.parametrize("scale", [0.0, 2.0**22])
@every_mlp
def test_both_paths_against_double_precision(kind, path, scale):
    potential = POTENTIALS[kind](24, 48)
    z, part = state(40, 24), stages("yoshida4", 5, 0.1)
    _, ends, _, grads = flown(path, potential, z, part, scale)
    exact = in_double(HamiltonianNeuralODE(potential, 5, 0.1, "yoshida4"))
    leaf = z.double().requires_grad_()
    exact_ends = exact(*leaf.unbind(-2))
    cotangents = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad(exact_ends, (leaf, *exact.potential.parameters()), list(cotangents))
    for x, y in zip(ends, exact_ends, strict=True):
        assert relative_error(x.double() / (scale or 1), y) < 1e-6
    grad_z = torch.stack(grads[:2], -2)
    if kind == "context":
        grad_z += grads.pop().unflatten(-1, (2, -1))
    assert relative_error(grad_z, wanted[0]) < 1e-5
    for x, y in zip(grads[2:], wanted[1:], strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 2.0**22])
@pytest.mark.parametrize("path", [KERNEL, PLAIN], ids=["kernel", "plain"])
@every_mlp
def test_advance_takes_a_state_as_it_is_held(kind, path, scale):
    """Two halves are the whole, with the state in integers in between."""
    potential = POTENTIALS[kind](8)
    advance, _ = path
    q, p = state(5, 8).unbind(-2)
    coefficients = (*potential.coefficients(), *potential.context(q, p))
    part = stages("leapfrog", 4, 0.1)
    once = advance(potential, q, p, coefficients, part, scale)
    twice = advance(potential, *once[:2], coefficients, part, scale)
    whole = advance(potential, q, p, coefficients, stages("leapfrog", 8, 0.1), scale)
    unit = scale or 1.0
    assert twice[0].dtype == whole[0].dtype
    for x, y in zip(twice[:2], whole[:2], strict=True):
        torch.testing.assert_close(x.double() / unit, y.double() / unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", [KERNEL, PLAIN], ids=["kernel", "plain"])
@every_mlp
def test_peak_tells_of_overflow(kind, path):
    potential, (advance, _) = POTENTIALS[kind](8), path
    part = stages("leapfrog", 4, 0.1)

    def run(z, scale, advance=advance):
        coefficients = (*potential.coefficients(), *potential.context(*z.unbind(-2)))
        return advance(potential, *z.unbind(-2), coefficients, part, scale)

    def peak(z, scale):
        return run(z, scale)[2].item()

    z = state(5, 8)
    assert 0 < peak(z, 2.0**22) < 2**26
    z[2, 1, 3] = 600.0
    assert peak(z, 2.0**22) >= symplectic.LIMIT
    # In floating point the kernel looks at the final state only, the plain path at every one.
    end_q, end_p, largest = run(z, 0.0)
    assert max(end_q.abs().max(), end_p.abs().max()) <= largest <= 1.001 * run(z, 0.0, Potential.advance)[2]
    z[2, 1, 3] = torch.nan
    assert not peak(z, 2.0**22) < symplectic.LIMIT
    assert not peak(z, 0.0) < torch.inf


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("gradient", ["exact", "reversible"])
def test_a_force_that_does_not_depend_on_the_state(gradient, trained):
    potential = UniformField(4, trained)
    z = state(5, 4).requires_grad_()
    end = moved(HamiltonianNeuralODE(potential, 3, 0.5, "leapfrog", gradient), z)
    torch.testing.assert_close(end[:, 1], z[:, 1] - 1.5 * potential.slope)
    torch.testing.assert_close(end[:, 0], z[:, 0] + 1.5 * z[:, 1] - 1.5**2 / 2 * potential.slope)
    end[:, 0].sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[1.0], [1.5]]).expand_as(z))
    if trained:
        torch.testing.assert_close(potential.slope.grad, torch.full((4,), -5 * 1.5**2 / 2))


@every_mlp
def test_half_precision_forces_keep_double_precision_parameters(kind):
    """So that a float64 copy of a layer is a reference."""
    potential = POTENTIALS[kind](6, force_precision="bf16").double()
    q = torch.randn(4, 6, dtype=torch.float64)
    other = POTENTIALS[kind](6).double()
    other.load_state_dict(potential.state_dict())
    context = some_context(potential, q)
    forces = [x.force(q, *x.coefficients(), *context) for x in (potential, other)]
    assert torch.equal(*forces)
