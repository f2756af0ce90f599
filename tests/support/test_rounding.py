"""What ``rounding`` expects, what it sees, and how small a fault that is."""

from __future__ import annotations

import pytest
import torch

from kernels.complex_activation import ACTIVATIONS, complex_activation
from kernels.complex_attention import SCORES, complex_attention_forward
from kernels.complex_linear import PARAMETERS, complex_linear, complex_linear_activated
from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm
from kernels.complex_rotary import rotate, split_heads
from kernels.symplectic import symplectic_flow
from muse.models import linear_cross_entropy
from support.rounding import FACTOR, RandomRounding, allowed_errors, errors_to_expect, find_fault, unit

TOKENS, WIDTH, HEADS = 40, 24, 3
WEIGHTS = [(2, WIDTH, WIDTH), (2 * WIDTH, WIDTH), (2 * WIDTH,), (50, WIDTH)]
# The relative error of one element that must be seen, in units of roundoff: 1.5e-5, 1.6 % and 12 %.
FAULT = {torch.float32: 2.0**8, torch.float16: 2.0**5, torch.bfloat16: 2.0**5}


def operations():
    """Each operation as a function of leaves, and their shapes."""
    z, square, gain, row = (TOKENS, 2, WIDTH), (2, WIDTH, WIDTH), (2, WIDTH), (WIDTH,)
    angle = torch.rand(TOKENS, WIDTH) * 6
    table = torch.stack((angle.cos(), angle.sin()), dim=-2)
    yield "product", complex_linear, [z, square, gain]
    yield "three products", lambda *x: complex_linear(*x, products=3), [z, square, gain]
    for kind, names in PARAMETERS.items():
        yield (
            f"product {kind}",
            lambda x, w, b, *p, k=kind, n=names: complex_linear_activated(
                x, w, b, activation=k, **dict(zip(n, p, strict=True))
            ),
            [z, square, gain, *[row] * len(names)],
        )
    yield "rms norm", complex_rms_norm, [z, gain]
    yield "sum and rms norm", add_complex_rms_norm, [z, z, gain]
    yield "layer norm", complex_layer_norm, [z, (3, WIDTH), gain]
    for kind, parameters in ACTIVATIONS.items():
        yield kind, lambda z, *p, k=kind: complex_activation(z, k, *p), [z, *[row] * parameters]
    yield "rotate", lambda z: rotate(z, table), [z]
    yield "split heads", lambda x: split_heads(x, table, HEADS, 1), [(2, TOKENS, 2, HEADS + 2, WIDTH)]
    for score in SCORES:
        yield (
            f"attention {score}",
            lambda *x, s=score: complex_attention_forward(*x, s, True)[0],
            [(1, HEADS, TOKENS, 2, WIDTH)] * 3,
        )
    flow = [(TOKENS, WIDTH)] * 2 + [(2 * WIDTH, WIDTH), (2 * WIDTH,), (2 * WIDTH,)]
    yield "force", lambda *x: symplectic_flow(*x, [1.0], [0.0])[1], flow
    for scale in (0.0, 2.0**22):
        yield (
            f"flow {scale}",
            lambda *x, s=scale: symplectic_flow(*x, [0.05, 0.1, 0.05], [0.1, 0.1, 0.0], scale=s)[:2],
            flow,
        )
    targets = torch.arange(TOKENS)
    yield (
        "cross-entropy",
        lambda x, w, b: linear_cross_entropy(x, w, targets, b),
        [(TOKENS, WIDTH), (50, WIDTH), (50,)],
    )


def run(function, leaves, cotangent_dtype=None):
    """Outputs, then the gradients of all leaves for random gradients of all outputs."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(cotangent_dtype or x.dtype) for x in outputs]
    cotangents = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def case(name, dtype):
    """Results of an operation, the exact ones, and the errors to expect."""
    function, shapes = {n: (f, s) for n, f, s in operations()}[name]
    wide_state = name.startswith(("flow", "force"))
    leaves = [
        (torch.randn(s) * (s[-1] ** -0.5 if s in WEIGHTS else 1)).to(
            torch.float32 if wide_state and i < 2 else dtype
        )
        for i, s in enumerate(shapes)
    ]
    results = run(function, leaves)
    exact = run(function, [x.double() for x in leaves], results[0].dtype)
    return results, exact, errors_to_expect(lambda: run(function, leaves), exact)


# Each operation in float32 and in one of the halves.
OPERATION_DTYPE = [
    (name, dtype)
    for n, (name, *_) in enumerate(operations())
    for dtype in (torch.float32, (torch.float16, torch.bfloat16)[n % 2])
]


@pytest.mark.parametrize(("name", "dtype"), OPERATION_DTYPE)
def test_one_wrong_element_is_seen(name, dtype):
    """In every output and gradient of every operation, wherever it is but for a fifth of their larger halves.

    The smaller half may be what is left of a difference, of which no computation keeps all digits.
    """
    everywhere = []
    for result, truth, errors in zip(*case(name, dtype), strict=True):
        assert find_fault(result, truth, errors) is None
        larger = (truth.abs() >= truth.abs().median()) & (truth != 0)
        if not larger.any():
            continue
        fault = FAULT[dtype] * unit(dtype)
        allowed = allowed_errors(truth, errors, result.dtype)
        wrong = result * (1 + fault)
        seen = (wrong.double() - truth).abs() > allowed
        # Some have few elements.
        assert seen[larger].double().mean() > 0.5
        everywhere.append(seen[larger])
        one = (seen & larger).flatten().nonzero()[0]
        planted = result.flatten().index_copy(0, one, wrong.flatten()[one]).view_as(result)
        assert find_fault(planted, truth, errors) is not None
    assert torch.cat(everywhere).double().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_term_left_out_of_one_sum_is_seen(dtype):
    """Of 64 in half precision, in one element of 1,600."""
    x, weight = torch.randn(40, 64).to(dtype), torch.randn(64, 40).to(dtype)
    exact, result = x.double() @ weight.double(), x @ weight
    (errors,) = errors_to_expect(lambda: [x @ weight], [exact])
    assert find_fault(result, exact, errors) is None
    term = (x[3].double() * weight[:, 5].double()).abs().argmax()
    result[3, 5] -= x[3, term] * weight[term, 5]
    assert "at (3, 5)" in find_fault(result, exact, errors)


def test_what_all_elements_lose_is_seen():
    """Half of what a single one may lose: no element is wrong by itself."""
    x, weight = torch.randn(2, 64, 64).unbind()
    exact = x.double() @ weight.double()
    (errors,) = errors_to_expect(lambda: [x @ weight], [exact])
    assert find_fault(x @ weight, exact, errors) is None
    lost = 0.5 * allowed_errors(exact, errors, torch.float32) * torch.randn(64, 64).sign()
    assert "root mean square" in find_fault((exact + lost).float(), exact, errors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_seen(bad):
    x = torch.randn(50)
    (errors,) = errors_to_expect(lambda: [x.exp()], [x.double().exp()])
    result = x.exp()
    result[7] = bad
    assert "at (7,)" in find_fault(result, x.double().exp(), errors)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("terms", [10, 100, 1000])
def test_a_running_sum_loses_what_is_expected(terms, positive):
    x = torch.rand(2000, terms) if positive else torch.randn(2000, terms)
    exact, total = x.double().sum(1), torch.zeros(2000)
    for column in x.unbind(1):
        total = total + column
    (errors,) = errors_to_expect(lambda: [x.sum(1)], [exact], samples=4)
    expected = errors.square().mean().sqrt() / FACTOR
    assert 0.4 < (total - exact).square().mean().sqrt() / expected < 1.3


def test_moved_values_are_not_rounded_and_changed_ones_are():
    """Also in place, into given memory and inside a custom op."""
    x = torch.randn(6, 2, 5)
    generator = torch.Generator().manual_seed(0)

    def changed(function):
        with RandomRounding(generator, 1e3):
            result = function(x.clone())
        return not torch.equal(result, function(x.clone()))

    assert not changed(lambda x: torch.cat((x.mT.reshape(5, -1).flip(0), -x.mT.reshape(5, -1))))
    assert not changed(lambda x: x.relu().double().float())
    assert not changed(lambda x: torch.where(x > 0, x, 0).masked_fill(x > 1, 7.0))
    assert changed(lambda x: x + 1)
    assert changed(lambda x: x.add_(1))
    assert changed(lambda x: torch.add(x, 1, out=torch.empty_like(x)))
    assert changed(lambda x: x.bfloat16())
    assert changed(lambda x: complex_rms_norm(x, torch.ones(2, 5)))


def test_a_threshold_may_be_crossed_either_way():
    """By a value that rounding can take across; by no other."""
    x = torch.tensor([0.3, 1.0, 1.7])
    third = torch.tensor(1 / 3)

    def gradient():
        leaf = x.clone().requires_grad_()
        return [torch.autograd.grad((leaf - 3 * third).relu().sum(), leaf)[0]]

    (errors,) = errors_to_expect(gradient, [torch.tensor([0.0, 1.0, 1.0]).double()])
    assert errors.amax(0).tolist() == [0, 1, 0]
