from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.rounding import assert_as_accurate

from kernels.complex_linear import complex_linear
from muse.layers import ComplexLinear
from muse.planar import from_complex, to_complex

SIZES = [(1, 1, 1), (3, 63, 65), (5, 1, 63), (2, 65, 1), (7, 17, 33)]


def reference(x, weight, bias=None):
    y = to_complex(x) @ torch.complex(weight[0], weight[1]).T
    return from_complex(y if bias is None else y + torch.complex(bias[0], bias[1]))


def plain(x, weight):
    """The four products as a user would write them, in the dtype of the operands."""
    (x_re, x_im), (w_re, w_im) = x.unbind(-2), weight
    return torch.stack((x_re @ w_re.T - x_im @ w_im.T, x_re @ w_im.T + x_im @ w_re.T), dim=-2)


def operands(rows, fan_in, fan_out):
    x, weight, bias = torch.randn(rows, 2, fan_in), torch.randn(2, fan_out, fan_in), torch.randn(2, fan_out)
    return tuple(t.double().requires_grad_() for t in (x, weight, bias))


def gradients(function, inputs, cotangent):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_is_the_complex_product(inputs, cotangent):
    """In value and every gradient."""
    found, expected = (gradients(product, inputs, cotangent) for product in (complex_linear, reference))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("count", [2, 3], ids=["without bias", "with bias"])
def test_value_and_gradients_are_those_of_the_complex_product(sizes, count):
    rows, _, fan_out = sizes
    assert_is_the_complex_product(operands(*sizes)[:count], torch.randn(rows, 2, fan_out))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_any_leading_shape(lead):
    inputs = torch.randn(*lead, 2, 4).double(), torch.randn(2, 5, 4).double()
    assert_is_the_complex_product(inputs, torch.randn(*lead, 2, 5))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 4)])
def test_gradcheck(sizes):
    x, weight, bias = operands(*sizes)
    assert torch.autograd.gradcheck(complex_linear, (x, weight, bias))
    assert torch.autograd.gradgradcheck(complex_linear, (x, weight, bias))


def test_operands_need_not_be_contiguous():
    x = torch.randn(2, 6, 5, dtype=torch.float64).transpose(0, 1)
    weight = torch.randn(2, 5, 7, dtype=torch.float64).mT
    cotangent = torch.randn(7, 2, 6, dtype=torch.float64).permute(2, 1, 0)
    assert not any(tensor.is_contiguous() for tensor in (x, weight, cotangent))
    assert_is_the_complex_product((x, weight), cotangent)


@pytest.mark.parametrize(
    ("sizes", "dtype"), [*zip(SIZES, itertools.cycle([torch.float32, torch.bfloat16, torch.float16]))]
)
def test_accuracy(dtype, sizes):
    x, weight, _ = (t.detach().to(dtype) for t in operands(*sizes))
    cotangent = torch.randn(sizes[0], 2, sizes[2]).to(dtype)
    exact = gradients(plain, (x.double(), weight.double()), cotangent.double())
    results = gradients(complex_linear, (x, weight), cotangent)
    assert_as_accurate(results, lambda: gradients(plain, (x, weight), cotangent), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer = ComplexLinear(8, 6)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    by_hand = complex_linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
    assert torch.equal(y, by_hand)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_weight", [True, False])
def test_only_wanted_gradients(needs_x, needs_weight):
    x = torch.randn(3, 2, 4, requires_grad=needs_x)
    weight = torch.randn(2, 5, 4, requires_grad=needs_weight)
    y = complex_linear(x, weight)
    assert y.requires_grad == (needs_x or needs_weight)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None) == needs_x
    assert (weight.grad is not None) == needs_weight


@pytest.mark.parametrize("fans", [(300, 200), (200, 300), (250, 250)])
@pytest.mark.parametrize("gain", [1.0, 0.25])
@pytest.mark.parametrize("init", ["glorot", "he"])
def test_variance_at_the_start(fans, gain, init):
    fan_in, fan_out = fans
    layer = ComplexLinear(fan_in, fan_out, init=init, gain=gain)
    square = layer.weight.detach().square().sum(0).mean().item()  # E|w|^2
    fan = (fan_in + fan_out) / 2 if init == "glorot" else fan_in / 2
    # |w|^2 is exponential: its mean over n samples has the relative deviation 1/sqrt(n).
    assert abs(square * fan / gain**2 - 1) < 5 / math.sqrt(fan_in * fan_out)
    assert (layer.bias == 0).all()
