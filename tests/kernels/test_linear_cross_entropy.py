from __future__ import annotations

import math

import pytest
import torch
from support.head import head_inputs, results, rounded
from support.rounding import assert_as_accurate

from kernels import linear_cross_entropy as operation
from kernels.launch import TARGETS, compiling_for
from kernels.linear_cross_entropy import eager, linear_cross_entropy, plain, takes_triton
from kernels.linear_cross_entropy.eager import shares_of

# Tokens, vocabulary, features.
SIZES = [(1, 7, 4), (37, 11, 6), (64, 2, 8), (65, 129, 2)]


@pytest.fixture(params=["one chunk", "chunks", "rows"])
def chunking(request, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", {"one chunk": 2**20, "chunks": 90, "rows": 1}[request.param])


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_every_gradient_are_those_of_cross_entropy(sizes, planar, with_bias):
    x, weight, bias, targets, grad = head_inputs(*sizes)
    weight = weight.unflatten(1, (2, -1)) if planar else weight
    given = x, weight, bias if with_bias else None, targets, grad
    got = results(linear_cross_entropy, *given)
    for actual, expected in zip(got, results(plain.linear_cross_entropy, *given), strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# One token has too few errors to compare.
@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize(
    ("dtype", "sizes"), [*zip([torch.float32, torch.bfloat16, torch.float16], SIZES[1:], strict=True)]
)
def test_accuracy(dtype, sizes):
    given = head_inputs(*sizes, dtype)
    got = results(linear_cross_entropy, *given)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype, dtype]

    def in_dtype():
        """Beyond ``rounded`` the logits are, by the library, and each chunk's sum for the weight."""
        return results(plain.linear_cross_entropy, *given)

    exact = results(plain.linear_cross_entropy, *(t.double() if t.is_floating_point() else t for t in given))
    assert_as_accurate(got, in_dtype, exact)


def test_the_maths_of_the_tests_is_right():
    given = head_inputs(37, 11, 6)
    for actual, expected in zip(rounded(*given), results(plain.linear_cross_entropy, *given), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", range(3))
def test_only_wanted_gradients(wanted):
    *tensors, targets, grad = head_inputs(9, 7, 4)
    expected = results(plain.linear_cross_entropy, *tensors, targets, grad)[1 + wanted]
    tensors = [t.detach() for t in tensors]
    tensors[wanted].requires_grad_()
    x, weight, bias = tensors
    linear_cross_entropy(x, weight, targets, bias).backward(grad)
    assert [t.grad is not None for t in tensors] == [index == wanted for index in range(3)]
    torch.testing.assert_close(tensors[wanted].grad, expected)


def test_gradcheck():
    x, weight, bias, targets, _ = head_inputs(5, 7, 4)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: linear_cross_entropy(x, w, targets, b), leaves)


@pytest.mark.parametrize("with_bias", [True, False])
def test_registration(with_bias):
    x, weight, bias, targets, grad = head_inputs(9, 7, 4, torch.bfloat16)
    bias = bias if with_bias else None
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(operation._linear_cross_entropy, (*leaves, targets))
    _, lse = operation._linear_cross_entropy(x, weight, bias, targets)
    for asked in ((True, True), (True, False), (False, True)):
        arguments = (grad, x, weight, bias, targets, lse, *asked)
        torch.library.opcheck(operation._linear_cross_entropy_backward, arguments)


@pytest.mark.slow
def test_compiles_in_one_graph():
    given = head_inputs(9, 7, 4, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for actual, expected in zip(
        results(compiled, *given), results(linear_cross_entropy, *given), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_no_second_derivative():
    x, weight, _, targets, grad = head_inputs(9, 7, 4)
    x.requires_grad_()
    (first,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, grad, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)


def test_nothing_counts():
    x, weight, bias, targets, grad = head_inputs(9, 7, 4)
    assert all((t == 0).all() for t in results(linear_cross_entropy, x, weight, bias, targets - 7, grad))


def test_no_tokens():
    given = head_inputs(0, 7, 4)
    losses, *gradients = results(linear_cross_entropy, *given)
    assert losses.shape == (0,)
    assert all((t == 0).all() for t in gradients)


def test_shares():
    grad, targets = torch.tensor([0.5, math.inf, -2.0, 1.0]), torch.tensor([1, -1, 0, 3])
    shares, scale = shares_of(grad, targets)
    assert scale == 2
    assert shares.tolist() == [0.25, 0, -1, 0.5]
    shares, scale = shares_of(torch.zeros(4), targets)
    assert (shares.tolist(), scale) == ([0] * 4, 0)


@pytest.mark.parametrize("fault", ["features", "targets", "bias", "planes"])
def test_shapes_that_do_not_fit(fault):
    x, weight, bias, targets, _ = head_inputs(9, 7, 4)
    match fault:
        case "features":
            x = x[:, :3]
        case "targets":
            targets = targets[:8]
        case "bias":
            bias = bias[:6]
        case "planes":
            weight = weight.reshape(7, 2, 2, 1)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(x, weight, targets, bias)


@pytest.mark.parametrize("fault", ["weight", "targets"])
def test_dtypes_that_do_not_fit(fault):
    x, weight, _, targets, _ = head_inputs(9, 7, 4)
    given = (x, weight.float(), targets) if fault == "weight" else (x, weight, targets.int())
    with pytest.raises(TypeError, match="int64"):
        linear_cross_entropy(*given)


def test_where_triton_runs():
    narrow, wide = torch.empty(3, 256).bfloat16(), torch.empty(3, 272).bfloat16()
    assert not takes_triton(narrow, training=True)
    for target in TARGETS:
        with compiling_for(target, print):
            assert [takes_triton(x, t) for x in (narrow, wide) for t in (True, False)] == [
                True, True, False, True,
            ]  # fmt: skip
            assert not takes_triton(narrow.float(), training=False)
            # Rows of these are not aligned.
            assert not takes_triton(narrow[:, :250], training=False)
