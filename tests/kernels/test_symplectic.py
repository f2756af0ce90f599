from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support import rounding
from support.flows import force, held_flow, leapfrog, reconstruct
from torch import Tensor
from torch.autograd import gradcheck

from kernels import symplectic
from kernels.launch import TARGETS
from kernels.symplectic import (
    POTENTIALS,
    advance,
    eager,
    fixed_point,
    potential,
    symplectic_flow,
    triton_code,
    undo,
)
from kernels.symplectic.scheme import Scheme, Weights
from kernels.triton_import import triton

SCALE = 2.0**20
NAMES = ("q", "p", "w1", "b1", "w2")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a test has several without many tokens."""
    monkeypatch.setattr(eager, "CHUNK", 512)


def make(
    tokens: int, width: int, hidden: int | None = None, dtype=torch.float32, weights=None, by_token=False
) -> list[Tensor]:
    hidden = hidden or 2 * width
    q, p = torch.randn(2, tokens, width, dtype=dtype)
    w1 = torch.randn(hidden, width, dtype=dtype) * width**-0.5
    b1 = torch.randn(tokens, hidden, dtype=dtype) if by_token else torch.randn(hidden, dtype=dtype) * 0.2
    w2 = torch.randn(hidden, dtype=dtype) * (0.5 / hidden**0.5)
    return [q, p, *(x.to(weights or dtype) for x in (w1, b1, w2))]


def plain_force(q, w1, b1, w2, phi="gelu_integral", confinement=0.0) -> Tensor:
    """By autograd, so that the closed form is tested, too."""
    with torch.enable_grad():
        q = q if q.requires_grad else q.detach().requires_grad_()
        value = potential(q, w1, b1, w2, phi, confinement).sum()
        return -torch.autograd.grad(value, q, create_graph=True)[0]


def gradients(run, tensors, seed=1):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, p = run(*leaves)[:2]
    torch.manual_seed(seed)
    weights = torch.randn(2, *q.shape)
    torch.autograd.backward((q, p), [w.to(q.dtype) for w in weights])
    return [x.grad for x in leaves]


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


# A b1 for all tokens or for each of them, and the stiffness of the spring.
FORMS = [(False, 0.0), (True, 0.0), (False, 0.7), (True, 0.7)]
every_form = pytest.mark.parametrize(("by_token", "spring"), FORMS)


@every_form
@pytest.mark.parametrize("phi", POTENTIALS)
def test_derivative_of_the_potential_is_the_force(phi, by_token, spring):
    q, _, *weights = make(7, 5, dtype=torch.float64, by_token=by_token)
    found, expected = (f(q, *weights, phi, spring).detach() for f in (force, plain_force))
    torch.testing.assert_close(found, expected)


def test_slope_of_the_default_potential_is_gelu():
    a = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    (slope,) = torch.autograd.grad(potential(a[:, None], one[:, None], 0 * one, one).sum(), a)
    torch.testing.assert_close(slope, F.gelu(a.detach()))


@every_form
@pytest.mark.parametrize("phi", POTENTIALS)
def test_gradcheck_of_force(phi, by_token, spring):
    q, _, *weights = make(4, 3, 5, dtype=torch.float64, by_token=by_token)
    leaves = [x.requires_grad_() for x in (q, *weights)]
    assert gradcheck(lambda *x: force(*x, phi, spring), leaves)


@every_form
@pytest.mark.parametrize("phi", POTENTIALS)
def test_gradcheck_of_the_floating_point_flow(phi, by_token, spring):
    leaves = [x.requires_grad_() for x in make(3, 3, 5, dtype=torch.float64, by_token=by_token)]
    kicks, drifts = [0.1, 0.0, -0.2, 0.3], [0.2, 0.1, 0.0, 0.4]
    assert gradcheck(lambda *x: symplectic_flow(*x, kicks, drifts, phi=phi, confinement=spring)[:2], leaves)


@every_form
@pytest.mark.parametrize("phi", POTENTIALS)
@pytest.mark.parametrize("scale", [0.0, 2.0**23])
@pytest.mark.parametrize("tokens", [1, 63, 1025])
def test_gradients_against_double_precision(phi, scale, tokens, by_token, spring):
    tensors, scheme = make(tokens, 40, 72, by_token=by_token), leapfrog(10, 0.1)
    doubles = [x.double() for x in tensors]
    options = {"phi": phi, "confinement": spring}
    exact = gradients(lambda *x: held_flow(*x, *scheme, **options), doubles)
    found = gradients(lambda *x: symplectic_flow(*x, *scheme, **options, scale=scale), tensors)
    for name, x, y in zip(NAMES, found, exact, strict=True):
        assert relative_error(x, y) <= 1e-5, name


# Every two of these choices meet.
@pytest.mark.parametrize(
    ("phi", "dtype", "scale", "form"),
    [
        (phi, dtype, scale, FORMS[(k + shift) % 4])
        for k, (phi, dtype) in enumerate(
            [
                *((phi, torch.float32) for phi in POTENTIALS),
                ("gelu_integral", torch.bfloat16),
                ("gelu_integral", torch.float16),
            ]
        )
        # Neither b1 nor the spring is the same in the second form.
        for scale, shift in ((0.0, 0), (2.0**23, 3 - 2 * (k % 4)))
    ],
)
def test_as_accurate_as_plain_pytorch(monkeypatch, phi, dtype, scale, form):
    monkeypatch.setattr(eager, "CHUNK", 40)
    by_token, spring = form
    tensors, scheme = make(65, 12, 40, weights=dtype, by_token=by_token), ([0.1, 0.2], [0.2, 0.1])

    def run(*x):
        return symplectic_flow(*x, *scheme, phi=phi, confinement=spring, scale=scale)[:2]

    def plain(*x):
        return held_flow(*x, *scheme, phi=phi, confinement=spring, scale=scale)

    def both(function, x):
        return [*function(*x), *gradients(function, x)]

    exact = both(plain, [x.double() for x in tensors])
    rounding.assert_as_accurate(both(run, tensors), lambda: both(plain, tensors), exact)


@pytest.mark.parametrize(("by_token", "spring"), [(False, 0.0), (True, 0.5)])
@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 512])
def test_exact_reconstruction(steps, dtype, width, by_token, spring):
    # Two chunks for the narrow state, a part of one for the wide one.
    tokens = 600 if width == 64 and steps < 1000 else 9
    q, p, *weights = make(tokens, width, 128, weights=dtype, by_token=by_token)
    # The potential is not bounded below: states must not run away.
    scheme = leapfrog(steps, min(0.1, 10 / steps))
    end_q, end_p, peak = advance(q, p, *weights, *scheme, confinement=spring, scale=SCALE)
    assert peak < 2**31
    assert end_q.dtype == end_p.dtype == torch.int32
    assert not torch.equal(end_q, fixed_point(q, SCALE))
    start_q, start_p = reconstruct(end_q, end_p, *weights, *scheme, confinement=spring, scale=SCALE)
    assert torch.equal(start_q, fixed_point(q, SCALE))
    assert torch.equal(start_p, fixed_point(p, SCALE))


def test_exact_reconstruction_in_double_precision():
    q, p, *weights = make(5, 8, dtype=torch.float64)
    end_q, end_p, _ = advance(q, p, *weights, *leapfrog(20, 0.1), scale=SCALE)
    start_q, start_p = reconstruct(end_q, end_p, *weights, *leapfrog(20, 0.1), scale=SCALE)
    assert torch.equal(start_q, fixed_point(q, SCALE))
    assert torch.equal(start_p, fixed_point(p, SCALE))


def test_backward_meets_the_states_of_the_forward_pass(monkeypatch):
    """Every force of the backward pass comes from the same bits as in the forward pass, and is the same."""
    seen: list[tuple[Tensor, Tensor]] = []
    activate = eager._activate

    def record(q, field, unit, rows):
        activate(q, field, unit, rows)
        seen.append((q.clone(), rows.slope.clone()))

    monkeypatch.setattr(eager, "_activate", record)
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        tensors = make(70, 48, 80, weights=dtype, by_token=True)
        gradients(lambda *x: symplectic_flow(*x, *leapfrog(30, 0.1), confinement=0.5, scale=SCALE), tensors)
        forward, backward = seen[:31], seen[31:]
        assert len(backward) == 31
        for (q, slope), (q_again, slope_again) in zip(forward, reversed(backward), strict=True):
            assert torch.equal(q, q_again)
            assert torch.equal(slope, slope_again)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_gpu_undoes_a_flow_by_the_kernel_that_made_it(target):
    """Compiled for other blocks, warps or stages, its forces could have other bits."""
    from kernels.resources import fingerprint, launches

    found = launches(target, triton_code.compile_cases())
    flows = [own for name, own in found.items() if name.endswith(" flow_kernel")]
    assert sum(len(own) > 1 for own in flows) > 20
    for own in flows:
        assert len({fingerprint([launch]) for launch in own}) == 1


def test_floating_point_reconstruction():
    q, p, *weights = make(30, 64)
    end_q, end_p, _ = advance(q, p, *weights, *leapfrog(100, 0.1))
    start_q, start_p = reconstruct(end_q, end_p, *weights, *leapfrog(100, 0.1))
    error = max((start_q - q).abs().max(), (start_p - p).abs().max())
    assert 0 < error < 1e-4


def test_returned_state_is_the_integers_over_the_scale():
    tensors = make(5, 16)
    whole_q, whole_p, _ = advance(*tensors, *leapfrog(3, 0.1), scale=SCALE)
    q, p, _ = symplectic_flow(*tensors, *leapfrog(3, 0.1), scale=SCALE)
    assert torch.equal(q, whole_q / SCALE)
    assert torch.equal(p, whole_p / SCALE)


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_time_reversal(scale):
    q, p, *weights = make(20, 32, dtype=torch.float64)
    scheme = leapfrog(20, 0.1)
    end_q, end_p, _ = symplectic_flow(q, p, *weights, *scheme, scale=scale)
    back_q, back_p, _ = symplectic_flow(end_q, -end_p, *weights, *scheme, scale=scale)
    tolerance = 1e-12 if scale == 0 else 1 / SCALE
    torch.testing.assert_close(back_q, q, rtol=0, atol=tolerance)
    torch.testing.assert_close(-back_p, p, rtol=0, atol=tolerance)


def test_volume_is_preserved():
    q, p, *weights = make(1, 4, dtype=torch.float64)

    def flow(state: Tensor) -> Tensor:
        end_q, end_p, _ = symplectic_flow(state[:, :4], state[:, 4:], *weights, *leapfrog(7, 0.3))
        return torch.cat((end_q, end_p), -1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, torch.cat((q, p), -1))[:, 0]
    assert abs(torch.linalg.det(jacobian).item() - 1) < 1e-12
    swap = torch.eye(8, dtype=torch.float64).roll(4, 0)
    form = swap * torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form)


def test_leapfrog_is_of_second_order():
    q, p, *weights = make(10, 6, dtype=torch.float64)
    best = symplectic_flow(q, p, *weights, *leapfrog(2048, 2 / 2048))[0]
    errors = [
        (symplectic_flow(q, p, *weights, *leapfrog(steps, 2 / steps))[0] - best).norm().item()
        for steps in (8, 16, 32)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.1)


def test_energy_is_kept():
    q, p, *weights = make(30, 32, dtype=torch.float64)

    def energy(q: Tensor, p: Tensor) -> Tensor:
        return 0.5 * p.square().sum(-1) + potential(q, *weights)

    end_q, end_p, _ = symplectic_flow(q, p, *weights, *leapfrog(500, 0.01))
    assert (energy(end_q, end_p) - energy(q, p)).abs().max() < 2e-3
    assert (potential(end_q, *weights) - potential(q, *weights)).abs().max() > 1


def test_coefficients_of_zero_evaluate_no_force(monkeypatch):
    forces = []
    activate = eager._activate
    monkeypatch.setattr(eager, "_activate", lambda *x: (forces.append(1), activate(*x)))
    q, p, *weights = make(4, 8)
    end_q, end_p, _ = symplectic_flow(q, p, *weights, [0.0, 0.1, 0.0], [0.5, 0.0, 0.5])
    assert len(forces) == 1
    torch.testing.assert_close(end_p, p + 0.1 * force(q + 0.5 * p, *weights))
    torch.testing.assert_close(end_q, q + 0.5 * p + 0.5 * end_p)


def test_no_stages():
    q, p, *weights = make(4, 8)
    end_q, end_p, _ = symplectic_flow(q, p, *weights, [], [])
    assert torch.equal(end_q, q)
    assert torch.equal(end_p, p)


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_tokens_do_not_touch(scale):
    """Also that the shape of the batch does not matter, nor its strides."""
    q, p, *weights = make(24, 16)
    scheme = leapfrog(3, 0.1)
    flat = symplectic_flow(q, p, *weights, *scheme, scale=scale)[0]
    shaped = symplectic_flow(q.view(2, 3, 4, 16), p.view(2, 3, 4, 16), *weights, *scheme, scale=scale)[0]
    assert torch.equal(flat.view(2, 3, 4, 16), shaped)
    strided = symplectic_flow(q.T.contiguous().T, p.T.contiguous().T, *weights, *scheme, scale=scale)[0]
    assert torch.equal(flat, strided)
    changed = q.clone()
    changed[7] += 1
    after = symplectic_flow(changed, p, *weights, *scheme, scale=scale)[0]
    others = torch.arange(24) != 7
    assert torch.equal(after[others], flat[others])
    assert not torch.equal(after[7], flat[7])


def test_no_tokens():
    tensors = make(0, 16)
    for scale in (0.0, SCALE):
        found = gradients(lambda *x, s=scale: symplectic_flow(*x, *leapfrog(2, 0.1), scale=s), tensors)
        assert found[0].shape == (0, 16)
        assert all(not x.any() for x in found)


def test_peak_detects_overflow():
    q, p, *weights = make(3, 8)
    scheme = leapfrog(10, 0.1)
    peak = symplectic_flow(q, p, *weights, *scheme, scale=SCALE)[2]
    states = [x.abs().max() for x in advance(q, p, *weights, *scheme, scale=SCALE)[:2]]
    assert max(states) <= peak < 2**24
    # The state wraps, which int32 alone would not tell.
    p[1, 2] = 1500.0
    q[1, 2] = 1500.0
    end_q, _, peak = advance(q, p, *weights, *scheme, scale=SCALE)
    assert 2**31 <= peak < 2**33
    assert 0 < end_q.double().abs().max() < 2**31
    # And comes back all the same.
    back_q, _ = reconstruct(
        *advance(q, p, *weights, *scheme, scale=SCALE)[:2], *weights, *scheme, scale=SCALE
    )
    assert torch.equal(back_q, fixed_point(q, SCALE))
    q[0, 0] = 1e6
    assert symplectic_flow(q, p, *weights, *scheme, scale=SCALE)[2] == math.inf


def test_forces_too_large_for_an_integer_leave_the_state_alone():
    q, p, *weights = make(5, 8)
    weights[2] *= 1e12
    _, end_p, peak = advance(q, p, *weights, [1.0], [0.0], scale=SCALE)
    assert peak == math.inf
    assert torch.equal(end_p, fixed_point(p, SCALE))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("where", [0, 1, 2, 3, 4])
def test_peak_tells_of_values_that_are_not_finite(bad, scale, where):
    tensors = make(5, 8)
    tensors[where].view(-1)[0] = bad
    assert not symplectic_flow(*tensors, *leapfrog(3, 0.1), scale=scale)[2].isfinite()


def test_largest_peak_is_not_hidden_by_rounding():
    """p ends at 2^31 exactly, where float32 numbers are 128 apart."""
    p = torch.tensor([[2.0**31 - 128]])
    zero = torch.zeros(1, 1)
    one = torch.ones(1)
    # With softplus the slope is 1/2 at 0, so the force is -w2 / 2.
    end = advance(zero, p, zero, 0 * one, -256 * one, [1.0], [0.0], phi="softplus", scale=1.0)
    assert end[2] < 2**31
    w1 = torch.tensor([[1.0]])
    _, end_p, peak = advance(zero, p, w1, 0 * one, -256 * one, [1.0], [0.0], phi="softplus", scale=1.0)
    assert peak >= 2**31
    assert end_p.item() == -(2**31)


def test_rounding_is_odd_and_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 2.0**30 + 64, 3e9]])
    assert fixed_point(x, 1.0).tolist() == [[0, 2, 2, 0, -2, -2, 2**30, 0]]
    assert torch.equal(fixed_point(-x, 1.0), -fixed_point(x, 1.0))


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_repeated_backward_is_bitwise_equal(scale):
    tensors = make(700, 24)
    first, second = (
        gradients(lambda *x: symplectic_flow(*x, *leapfrog(5, 0.1), scale=scale), tensors) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_rows_of_b1_that_are_equal_are_one_b1():
    """Whatever the shape of the batch; and the gradient of the one is the sum of those of the rows."""
    q, p, w1, b1, w2 = make(1040, 16)
    shape = (2, 520, 16)
    rows = b1.expand(*shape[:-1], len(b1))
    run = lambda *x: symplectic_flow(*x, *leapfrog(3, 0.1), scale=SCALE)  # noqa: E731
    shared = gradients(run, [q.view(shape), p.view(shape), w1, b1, w2])
    by_token = gradients(run, [q.view(shape), p.view(shape), w1, rows, w2])
    assert by_token[3].shape == rows.shape
    by_token[3] = by_token[3].sum((0, 1))
    for name, x, y in zip(NAMES, by_token, shared, strict=True):
        assert relative_error(x, y.double()) < 1e-5, name


@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("wanted", range(5))
def test_only_some_gradients(scale, wanted):
    tensors = make(20, 8)
    every = gradients(lambda *x: symplectic_flow(*x, *leapfrog(3, 0.1), scale=scale), tensors)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
    q, p, _ = symplectic_flow(*leaves, *leapfrog(3, 0.1), scale=scale)
    torch.manual_seed(1)
    torch.autograd.backward((q, p), list(torch.randn(2, *q.shape)))
    assert torch.equal(leaves[wanted].grad, every[wanted])
    assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)


def test_gradient_of_one_output():
    tensors = [x.requires_grad_() for x in make(20, 8, dtype=torch.float64)]
    symplectic_flow(*tensors, *leapfrog(3, 0.1))[1].square().sum().backward()
    others = [x.detach().clone().requires_grad_() for x in tensors]
    held_flow(*others, *leapfrog(3, 0.1))[1].square().sum().backward()
    for x, y in zip(tensors, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_saves_the_final_state_and_the_weights_only():
    saved: list[Tensor] = []
    leaves = [x.requires_grad_() for x in make(1000, 32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        symplectic_flow(*leaves, *leapfrog(50, 0.1), scale=SCALE)
    assert [x.dtype for x in saved[:2]] == [torch.int32, torch.int32]
    assert [x.shape for x in saved[:2]] == [(1000, 32)] * 2
    assert [x.data_ptr() for x in saved[2:]] == [x.data_ptr() for x in leaves[2:]]


def test_never_holds_the_hidden_state():
    """No tensor has as many elements as tokens x hidden / 2."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return result

    tensors = make(4096, 16, 64)
    q, p, *weights = tensors
    with Watch():
        ends = eager.flow(
            q,
            p,
            Weights(*weights, "gelu_integral", 0.0),
            Scheme(*leapfrog(2, 0.1), SCALE),
        )
        eager.flow_backward(
            q,
            p,
            *ends[:2],
            Weights(*weights, "gelu_integral", 0.0),
            Scheme(*leapfrog(2, 0.1), SCALE),
            parameters=True,
            rebuilt=True,
        )
    assert 0 < largest < 4096 * 64 / 2


def test_changed_weights_are_refused():
    leaves = [x.requires_grad_() for x in make(5, 8)]
    q, _, _ = symplectic_flow(*leaves, *leapfrog(2, 0.1), scale=SCALE)
    with torch.no_grad():
        leaves[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_autocast_changes_nothing():
    tensors = make(40, 16)
    scheme = leapfrog(3, 0.1)
    expected = gradients(lambda *x: symplectic_flow(*x, *scheme, scale=SCALE), tensors)

    def under_autocast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return symplectic_flow(*x, *scheme, scale=SCALE)

    found = gradients(under_autocast, tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_double_backward_is_refused():
    leaves = [x.requires_grad_() for x in make(5, 8)]
    q, _, _ = symplectic_flow(*leaves, *leapfrog(2, 0.1))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(q.square().sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_opcheck(scale, by_token):
    tensors = make(5, 8, by_token=by_token)
    kicks, drifts = leapfrog(2, 0.1)
    rest = (kicks, drifts, "gelu_integral", 0.5, scale)
    torch.library.opcheck(symplectic._symplectic_flow, (*tensors, *rest))
    q, p, *weights = tensors
    end_q, end_p, _ = advance(*tensors, kicks, drifts, confinement=0.5, scale=scale)
    for wanted in ((True, False), (False, True)):
        torch.library.opcheck(
            symplectic._symplectic_flow_backward, (q, p, end_q, end_p, *weights, *rest, *wanted)
        )


SCHEMES = {
    "leapfrog": leapfrog(2, 0.1),
    "position verlet": ([0.0, 0.1, 0.1], [0.05, 0.1, 0.05]),
    "drifts first": ([0.0, 0.0, 0.1], [0.05, 0.1, 0.0]),
    "no kick": ([0.0, 0.0], [0.05, 0.1]),
}


@pytest.mark.parametrize("stages", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_gradients_need_nothing_before_the_first_kick(scale, stages, monkeypatch):
    q, p, *weights = make(9, 8)
    end_q, end_p, _ = advance(q, p, *weights, *stages, scale=scale)
    forces, force = [], eager._activated_force
    monkeypatch.setattr(eager, "_activated_force", lambda *given: forces.append(given) or force(*given))
    options = {"scale": scale, "rebuilt": False}
    start_q, start_p, *found = undo(p, q, end_q, end_p, *weights, *stages, **options)
    assert start_q.numel() == start_p.numel() == 0
    assert len(forces) == max(0, sum(kick != 0 for kick in stages[0]) - 1)
    _, _, *expected = undo(p, q, end_q, end_p, *weights, *stages, scale=scale)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("by_token", [False, True])
def test_compiles(by_token):
    def step(*x):
        q, p, peak = symplectic_flow(*x, *leapfrog(3, 0.1), confinement=0.5, scale=SCALE)
        return q * 2, p, peak

    tensors = make(33, 16, by_token=by_token)
    compiled = torch.compile(step, fullgraph=True)
    for x, y in zip(gradients(compiled, tensors), gradients(step, tensors), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"phi": "relu"}, ValueError, "phi=relu"),
        ({"scale": 3.0}, ValueError, "power of two"),
        ({"scale": -2.0}, ValueError, "power of two"),
        ({"scale": math.inf}, ValueError, "power of two"),
        ({"scale": math.nan}, ValueError, "power of two"),
        ({"drifts": [0.1]}, ValueError, "2 kicks but 1 drifts"),
        ({"q": torch.zeros(3, 9)}, ValueError, "must both be"),
        ({"p": torch.zeros(4, 8)}, ValueError, "must both be"),
        ({"w2": torch.zeros(5)}, ValueError, "must be"),
        ({"b1": torch.zeros(2, 16)}, ValueError, "a row for each token"),
        ({"p": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "p is torch.float64"),
        ({"w1": torch.zeros(16, 8, dtype=torch.float64)}, TypeError, "do not go with"),
        (
            {"q": torch.zeros(3, 8, dtype=torch.bfloat16), "p": torch.zeros(3, 8, dtype=torch.bfloat16)},
            TypeError,
            "state must be",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(NAMES, make(3, 8), strict=True)) | {"kicks": [0.1, 0.1], "drifts": [0.1, 0.0]}
    with pytest.raises(error, match=message):
        symplectic_flow(**(arguments | change))


def test_undo_takes_the_state_as_it_is_held():
    q, p, *weights = make(3, 8)
    with pytest.raises(TypeError, match=r"must be torch.int32"):
        undo(q, p, q, p, *weights, *leapfrog(1, 0.1), scale=SCALE)
    with pytest.raises(TypeError, match="must be"):
        undo(q, p, q.int(), p.int(), *weights, *leapfrog(1, 0.1))
