from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from muse.layers import Cardioid, ComplexFFN, ModReLU, ModSwish, SplitGELU, ZReLU
from muse.layers.activation import build_activation
from muse.planar import from_complex, modulus, to_complex

NAMES = ["mod_relu", "mod_swish", "split_gelu", "cardioid", "z_relu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(*shape, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype) * 1.5


def apply(activation, c):
    return to_complex(activation.double()(from_complex(c)).detach())


def with_parameters(activation, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(activation, name).copy_(value)
    return activation


def test_mod_relu_without_bias_is_the_identity():
    z = torch.randn(50, 2, 7)
    torch.testing.assert_close(ModReLU(7)(z), z, rtol=1e-6, atol=0)


def test_mod_relu_is_its_formula():
    bias = torch.linspace(-2, 1, 7, dtype=torch.float64)
    c = sample(40, 7)
    y = apply(with_parameters(ModReLU(7), bias=bias), c)
    torch.testing.assert_close(y, F.relu(c.abs() + bias) * c / c.abs(), atol=1e-9, rtol=1e-6)
    off = c.abs() + bias < 0
    assert off.any()
    assert (~off).any()
    assert (y[off] == 0).all()


def test_mod_swish_is_its_formula():
    slope, bias = torch.linspace(-1, 2, 7).double(), torch.linspace(-2, 1, 7).double()
    c = sample(40, 7)
    y = apply(with_parameters(ModSwish(7), slope=slope, bias=bias), c)
    torch.testing.assert_close(y, c * torch.sigmoid(slope * c.abs() + bias), atol=1e-9, rtol=1e-6)


def test_cardioid_is_its_formula():
    c = sample(40, 7)
    torch.testing.assert_close(apply(Cardioid(), c), (1 + c.angle().cos()) * c / 2, atol=1e-9, rtol=1e-6)


def test_z_relu_keeps_the_first_quadrant():
    c = sample(40, 7)
    y = apply(ZReLU(), c)
    inside = (c.angle() > 0) & (c.angle() < math.pi / 2)
    assert torch.equal(y[inside], c[inside])
    assert (y[~inside] == 0).all()
    assert inside.any()
    assert (~inside).any()


def test_split_gelu_acts_on_each_plane():
    c = sample(40, 7)
    torch.testing.assert_close(apply(SplitGELU(), c), torch.complex(F.gelu(c.real), F.gelu(c.imag)))


@pytest.mark.parametrize("name", ["mod_relu", "mod_swish"])
@pytest.mark.parametrize("angle", [0.3, math.pi / 2, 3.0])
def test_modulus_gates_turn_with_their_input(name, angle):
    activation = build_activation(name, 7, median=1.0)
    c = sample(40, 7)
    turn = complex(math.cos(angle), math.sin(angle))
    torch.testing.assert_close(apply(activation, c * turn), apply(activation, c) * turn)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_away_from_kinks(name):
    activation = build_activation(name, 5, median=1.0).double()
    # Moduli of 0.5 or 1.7 and phases off the axes: clear of |z| = 0, of |z| = 1 and of the quadrants' edges.
    radius = torch.tensor([0.5, 1.7]).double()[torch.randint(2, (4, 5))]
    angle = 0.4 + 0.6 * torch.rand(4, 5).double() + math.pi / 2 * torch.randint(4, (4, 5))
    z = from_complex(torch.polar(radius, angle)).requires_grad_()

    def function(z, *_):
        return activation(z)

    assert torch.autograd.gradcheck(function, (z, *activation.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-0.5, 0.0, 0.5])
def test_value_and_gradient_near_zero_are_finite(name, dtype, offset):
    activation = build_activation(name, 6, median=-offset).to(dtype)
    tiny = torch.finfo(dtype).tiny
    z = torch.zeros(4, 2, 6, dtype=dtype)
    z[1, 0] = tiny
    z[2, 1] = -tiny
    z[3] = 1e-5
    z.requires_grad_()
    y = activation(z)
    y.sum().backward()
    assert (y[0] == 0).all()
    assert y.isfinite().all()
    assert z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in activation.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(name, dtype):
    """One rounding of the result: the gate is worked out in float32."""
    activation = build_activation(name, 65, median=1.0).to(dtype)
    z = (torch.randn(30, 2, 65) * 3).to(dtype)
    result = activation(z)
    exact = activation.double()(z.double())
    assert result.dtype == dtype
    ulps = 2 if dtype != torch.float32 else 8
    torch.testing.assert_close(result.double(), exact, rtol=ulps * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("init", ["glorot", "he"])
@pytest.mark.parametrize("sizes", [(48, 128), (64, 64)])
def test_mod_relu_starts_with_about_half_of_the_units_off(init, sizes):
    ffn = ComplexFFN(*sizes, activation="mod_relu", init=init)
    z = torch.randn(200, 2, sizes[0]) / math.sqrt(2)  # E|z|^2 = 1, as a norm leaves it
    hidden = ffn.up(z)
    off = (ffn.activation(hidden) == 0).all(-2).double().mean()
    assert 0.3 < off < 0.7
    assert torch.equal(off > 0, (modulus(hidden) < -ffn.activation.bias).any())


def test_unknown_name():
    with pytest.raises(ValueError, match="tanh"):
        build_activation("tanh", 4, 1.0)
