"""The Triton code of the flow.

In the interpreter the state stays on chip for widths up to 32; up to 64 the products run over whole rows,
above in pieces.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import rounding
from support.dtypes import in_each_half
from support.flows import force, held_flow, leapfrog, reconstruct
from torch import Tensor

from kernels.launch import eager
from kernels.symplectic import POTENTIALS, advance, fixed_point, symplectic_flow, triton_code, undo
from kernels.symplectic.plain import plain_force
from kernels.symplectic.scheme import Scheme, reversed_scheme

SCALE = 2.0**20
SPRINGS = (0.0, 0.7)
SINGLE_AND_HALF = (torch.float32, torch.float16)
# Kicks and drifts: two kicks, one of them without a drift, and a drift alone.
STAGES = ([0.05, 0.1, 0.0], [0.1, 0.0, 0.1])


def make(tokens, width, hidden, dtype, device, by_token=False) -> list[Tensor]:
    q, p = torch.randn(2, tokens, width)
    w1 = torch.randn(hidden, width) * width**-0.5
    b1 = torch.randn(tokens, hidden) if by_token else torch.randn(hidden) * 0.2
    w2 = torch.randn(hidden) * (0.5 / hidden**0.5)
    return [x.to(device) for x in (q, p, *(w.to(dtype) for w in (w1, b1, w2)))]


def run(function, tensors):
    """Results and gradients of everything."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).to(x.device, x.dtype) for x in results]
    torch.autograd.backward(results, weights)
    return [*results, *(x.grad for x in leaves)]


def compare(function, plain, tensors):
    """Hold results and gradients against float64."""
    exact = run(plain, [x.double() for x in tensors])
    rounding.assert_as_accurate(run(function, tensors), lambda: run(plain, tensors), exact)


def compare_flow(tensors, phi="gelu_integral", scale=0.0, stages=STAGES, spring=0.0):
    compare(
        lambda *x: symplectic_flow(*x, *stages, phi=phi, confinement=spring, scale=scale)[:2],
        lambda *x: held_flow(*x, *stages, phi=phi, confinement=spring, scale=scale),
        tensors,
    )


# Each way of holding a state with each kind of b1, for all tokens or for each of them; the dtypes and the
# stiffness of the spring so that every two choices meet.
FLOWS = [
    (
        width,
        scale,
        by_token,
        SPRINGS[(w + by_token) % 2],
        (torch.float32, torch.float16)[(w + s + by_token) % 2],
    )
    for w, width in enumerate((20, 48, 100))
    for s, scale in enumerate((0.0, SCALE))
    for by_token in (False, True)
]


@pytest.mark.parametrize(("width", "scale", "by_token", "spring", "dtype"), in_each_half(FLOWS))
def test_flow(width, scale, by_token, spring, dtype, device):
    tokens = 33 if width == 20 else 65
    compare_flow(make(tokens, width, 56, dtype, device, by_token), scale=scale, spring=spring)


def test_flow_of_one_token(device):
    compare_flow(make(1, 24, 40, torch.float32, device), scale=SCALE)


@pytest.mark.parametrize(("width", "by_token"), [(20, False), (48, True)])
def test_sums_over_several_blocks_of_tokens(width, by_token, device, monkeypatch):
    """A program sums over two blocks, the last one of a single token."""
    tensors = make(1, width, 40, torch.float32, device)
    options = triton_code._options("parameters", tensors[2])
    monkeypatch.setattr(triton_code, "PROGRAMS", 2 * -(-40 // options["BLOCK_H"]))
    tokens = 3 * options["BLOCK_M"] + 1
    compare_flow(make(tokens, width, 40, torch.float32, device, by_token), scale=SCALE)


@pytest.mark.parametrize(("phi", "scale"), list(zip(POTENTIALS, (0.0, SCALE) * 2, strict=True)))
def test_flow_in_any_potential(phi, scale, device):
    compare_flow(make(33, 16, 32, torch.float32, device), phi, scale)


# As above, so that every two choices meet.
FORMS = [
    (20, torch.float32, False, 0.7),
    (20, torch.float16, True, 0.0),
    (48, torch.float32, True, 0.7),
    (48, torch.float16, False, 0.0),
    (100, torch.float32, True, 0.0),
    (100, torch.float16, False, 0.7),
]
every_form = pytest.mark.parametrize(("width", "dtype", "by_token", "spring"), in_each_half(FORMS))


@every_form
def test_force(width, dtype, by_token, spring, device):
    q, _, *weights = make(63, width, 40, dtype, device, by_token)
    compare(
        lambda *x: (force(*x, confinement=spring),),
        lambda *x: (plain_force(*x, "gelu_integral", spring),),
        [q, *weights],
    )


@pytest.mark.parametrize("phi", POTENTIALS[1:])
def test_force_of_any_potential(phi, device):
    q, _, *weights = make(5, 16, 24, torch.float32, device)
    compare(lambda *x: (force(*x, phi),), lambda *x: (plain_force(*x, phi),), [q, *weights])


@every_form
def test_exact_reconstruction(width, dtype, by_token, spring, device):
    """The stages one by one, as the backward pass runs them, or all together bring the initial state back."""
    q, p, *weights = make(37, width, 40, dtype, device, by_token)
    options = {"confinement": spring, "scale": SCALE}
    for steps in (5,) if device.type == "cpu" else (1, 10, 100, 1000):
        stages = leapfrog(steps, min(0.1, 10 / steps))
        end_q, end_p, peak = advance(q, p, *weights, *stages, **options)
        assert peak < 2**31
        start_q, start_p = reconstruct(end_q, end_p, *weights, *stages, **options)
        assert torch.equal(start_q, fixed_point(q, SCALE))
        assert torch.equal(start_p, fixed_point(p, SCALE))
        undo = reversed_scheme(Scheme(*stages, SCALE))
        for kick, drift in zip(undo.kicks, undo.drifts, strict=True):
            end_q, end_p, _ = advance(end_q, end_p, *weights, [kick], [drift], **options)
        assert torch.equal(end_q, start_q)
        assert torch.equal(end_p, start_p)


@pytest.mark.parametrize("width", [20, 100])
def test_backward_meets_the_states_of_the_forward_pass(monkeypatch, device, width):
    seen: list[Tensor] = []
    adjoint = triton_code._launch_adjoint

    def record(q, *rest):
        seen.append(q.clone())
        adjoint(q, *rest)

    monkeypatch.setattr(triton_code, "_launch_adjoint", record)
    tensors = make(33, width, 40, torch.float32, device, by_token=True)
    run(lambda *x: symplectic_flow(*x, *STAGES, confinement=0.5, scale=SCALE)[:2], tensors)
    kicked = [stage for stage, kick in enumerate(STAGES[0]) if kick]
    assert len(seen) == len(kicked)
    for stage, q in zip(reversed(kicked), seen, strict=True):
        before, _, _ = advance(*tensors, *(x[:stage] for x in STAGES), confinement=0.5, scale=SCALE)
        assert torch.equal(q, before)


@pytest.mark.parametrize(("width", "stages"), [(20, STAGES), (100, ([0.0, 0.1], [0.05, 0.05]))])
def test_the_initial_state_is_rebuilt_where_it_is_wanted(width, stages, device):
    q, p, *weights = make(17, width, 40, torch.float32, device)
    end_q, end_p, _ = advance(q, p, *weights, *stages, scale=SCALE)
    start_q, start_p, *gradients = undo(p, q, end_q, end_p, *weights, *stages, scale=SCALE)
    assert torch.equal(start_q, fixed_point(q, SCALE))
    assert torch.equal(start_p, fixed_point(p, SCALE))
    no_q, no_p, *others = undo(p, q, end_q, end_p, *weights, *stages, scale=SCALE, rebuilt=False)
    assert no_q.numel() == no_p.numel() == 0
    for x, y in zip(gradients, others, strict=True):
        assert torch.equal(x, y)


def test_exact_state_is_close_to_that_of_the_eager_code(device):
    tensors = make(33, 40, 56, torch.float32, device)
    found = advance(*tensors, *STAGES, scale=SCALE)
    with eager():
        expected = advance(*tensors, *STAGES, scale=SCALE)
    for x, y in zip(found, expected, strict=True):
        # Forces differ in the last bits, which may turn a rounding.
        assert (x.double() - y.double()).abs().max() <= 2 * len(STAGES[0])


def test_rounding_is_that_of_torch(device):
    width = 16
    halves = [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 0.49999997, 8388607.5, 4194303.5]
    increments = torch.tensor([*halves, 2**30, 0, 1, -1, 9, 7])
    # With softplus the slope at 0 is 1/2, so F = -w2 / 2 on the axes of W1 = 1.
    zero = torch.zeros(1, width, device=device)
    w1, b1 = torch.eye(width, device=device), torch.zeros(width, device=device)
    w2 = -2 * increments.to(device)
    _, p, _ = advance(zero, zero, w1, b1, w2, [1.0], [0.0], phi="softplus", scale=1.0)
    assert torch.equal(p[0].cpu(), increments.round().int())
    _, p, _ = advance(zero, zero, w1, b1, w2, [-1.0], [0.0], phi="softplus", scale=1.0)
    assert torch.equal(p[0].cpu(), -increments.round().int())


@pytest.mark.parametrize("width", [20, 100])
def test_peak_detects_overflow(device, width):
    q, p, *weights = make(33, width, 40, torch.float32, device)
    stages = leapfrog(4, 0.25)
    peak = symplectic_flow(q, p, *weights, *stages, scale=SCALE)[2]
    largest = max(x.abs().max().item() for x in advance(q, p, *weights, *stages, scale=SCALE)[:2])
    assert largest <= peak < 2**24
    p[32, 1] = 1500.0
    q[32, 1] = 1500.0
    assert 2**31 <= symplectic_flow(q, p, *weights, *stages, scale=SCALE)[2] < 2**33
    end_q, end_p, _ = advance(q, p, *weights, *stages, scale=SCALE)
    start_q, _ = reconstruct(end_q, end_p, *weights, *stages, scale=SCALE)
    assert torch.equal(start_q, fixed_point(q, SCALE))


@pytest.mark.parametrize("width", [16, 128])
def test_peak_is_that_of_tokens(device, width):
    """Blocks reach past the last token, where q = 0 and the force is 5000; at the tokens it is 0."""
    q = torch.full((3, width), -100.0, device=device)
    w1, one = torch.eye(width, device=device), torch.ones(width, device=device)
    peak = symplectic_flow(q, 0 * q, w1, 5 * one, 1000 * one, *STAGES, scale=SCALE)[2]
    assert peak == 100 * SCALE


@pytest.mark.parametrize("where", range(5))
@pytest.mark.parametrize(("width", "bad"), [(20, math.nan), (100, math.inf)])
def test_peak_tells_of_values_that_are_not_finite(device, bad, where, width):
    tensors = make(5, width, 24, torch.float32, device)
    tensors[where].view(-1)[0] = bad
    for scale in (0.0, SCALE):
        assert not symplectic_flow(*tensors, *leapfrog(2, 0.1), scale=scale)[2].isfinite()


def test_forces_too_large_for_an_integer(device):
    q, p, *weights = make(5, 20, 24, torch.float32, device)
    weights[2] *= 1e12
    _, end_p, peak = advance(q, p, *weights, [1.0], [0.0], scale=SCALE)
    assert peak == math.inf
    assert torch.equal(end_p, fixed_point(p, SCALE))


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_strides_and_batches(device, scale):
    q, p, *weights = make(24, 20, 40, torch.float32, device)
    expected = run(lambda *x: symplectic_flow(*x, *STAGES, scale=scale)[:2], [q, p, *weights])

    def strided(q, p, w1, b1, w2):
        q, w1 = (x.T.contiguous().T for x in (q, w1))
        return symplectic_flow(q, p, w1, b1, w2, *STAGES, scale=scale)[:2]

    found = run(strided, [q, p, *weights])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    shaped = symplectic_flow(q.view(2, 12, 20), p.view(2, 12, 20), *weights, *STAGES, scale=scale)[0]
    assert torch.equal(shaped.view(24, 20), expected[0])


def test_zeros(device):
    tensors = [torch.zeros_like(x) for x in make(17, 20, 24, torch.float32, device)]
    for x in run(lambda *x: symplectic_flow(*x, *STAGES, scale=SCALE)[:2], tensors)[:2]:
        assert not x.any()


def test_large_values(device):
    q, p, *weights = make(17, 20, 24, torch.float32, device)
    compare_flow([100 * q, 100 * p, *weights])


def test_no_tokens(device):
    for scale in (0.0, SCALE):
        found = run(
            lambda *x, s=scale: symplectic_flow(*x, *STAGES, scale=s)[:2],
            make(0, 20, 24, torch.float32, device),
        )
        assert all(not x.any() for x in found)


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_repeated_backward_is_bitwise_equal(device, scale):
    tensors = make(65, 48, 40, torch.float32, device, by_token=scale > 0)
    first, second = (run(lambda *x: symplectic_flow(*x, *STAGES, scale=scale)[:2], tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("by_token", [False, True])
def test_only_gradients_of_the_state(device, by_token):
    tensors = make(33, 20, 40, torch.float32, device, by_token)
    every = run(lambda *x: symplectic_flow(*x, *STAGES, scale=SCALE)[:2], tensors)
    _, _, *weights = tensors
    some = run(lambda q, p: symplectic_flow(q, p, *weights, *STAGES, scale=SCALE)[:2], tensors[:2])
    assert all(torch.equal(x, y) for x, y in zip(some, every[:4], strict=True))


def test_width_too_large(device):
    with pytest.raises(ValueError, match="width 1025 is too large"):
        symplectic_flow(*make(2, 1025, 16, torch.float32, device), *STAGES)
