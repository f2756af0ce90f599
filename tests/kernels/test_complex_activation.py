from __future__ import annotations

import math

import pytest
import torch
from support.pointwise import DTYPES, case, results, turned

from kernels.complex_activation import ACTIVATIONS, complex_activation, triton_code
from kernels.launch import TARGETS, compiling_for
from kernels.triton_import import triton
from muse.planar import from_complex, to_complex


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradcheck_away_from_kinks(kind):
    # Moduli of 0.5 or 1.7 and phases off the axes: clear of |z| = 0, of |z| = 1 and of the quadrants' edges.
    radius = torch.tensor([0.5, 1.7]).double()[torch.randint(2, (4, 5))]
    angle = 0.4 + 0.6 * torch.rand(4, 5).double() + math.pi / 2 * torch.randint(4, (4, 5))
    leaves = [
        from_complex(torch.polar(radius, angle)),
        torch.full((5,), -1.0).double(),
        torch.randn(5).double(),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves[: 1 + ACTIVATIONS[kind]]]
    assert torch.autograd.gradcheck(lambda z, *p: complex_activation(z, kind, *p), leaves)


@pytest.mark.parametrize("name", ["split_gelu", "cardioid", "z_relu"])
def test_does_not_turn_with_its_input(name):
    function, _, (z,) = case(name)
    assert (function(turned(z, 1.0)) - turned(function(z), 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-0.5, 0.0, 0.5])
def test_activation_near_zero_is_finite(kind, dtype, offset):
    z = torch.zeros(4, 2, 6, dtype=dtype)
    z[1, 0], z[2, 1], z[3] = torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny, 1e-5
    leaves = [z, torch.full((6,), offset).to(dtype), torch.ones(6).to(dtype)][: 1 + ACTIVATIONS[kind]]
    y, *gradients = results(lambda z, *p: complex_activation(z, kind, *p), leaves)
    assert (y[0] == 0).all()
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_mod_relu_without_offset_is_the_identity(dtype):
    z = torch.randn(50, 2, 7).to(dtype)
    y, grad, _ = results(lambda z, b: complex_activation(z, "mod_relu", b), [z, torch.zeros(7, dtype=dtype)])
    assert torch.equal(y, z)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(grad, torch.randn(z.shape, generator=generator, dtype=torch.float64).to(dtype))


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_mod_relu_divides_exactly_on_a_gpu():
    """Else |z| / |z| is 1 up to rounding, and mod_relu without an offset the identity up to that."""
    from kernels.resources import compile_launch, specialise

    target = next(target for target in TARGETS if target.name == "sm_90")
    programs = []

    def compiler(kernel, arguments, options):
        programs.append(compile_launch(specialise(target, kernel, arguments, options)).asm["ptx"])

    with compiling_for(target, compiler), torch.device("meta"):
        z = torch.empty(4, 2, 64)
        triton_code.activation(z, "mod_relu", z[0, 0], None)
    (program,) = programs
    assert "div.rn.f32" in program
    assert "div.full" not in program


def test_mod_relu_switches_units_off():
    z, offset = torch.randn(200, 2, 8).double(), torch.full((8,), -1.2).double()
    off = (complex_activation(z, "mod_relu", offset) == 0).all(-2)
    assert torch.equal(off, to_complex(z).abs() <= 1.2)
    assert 0.3 < off.double().mean() < 0.7


def test_bad_input():
    z, row = torch.randn(4, 2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"unknown activation tanh; choose one of mod_relu"):
        complex_activation(z, "tanh")
    with pytest.raises(ValueError, match="mod_relu takes offset only"):
        complex_activation(z, "mod_relu")
    with pytest.raises(ValueError, match="mod_swish takes offset and slope"):
        complex_activation(z, "mod_swish", row)
    with pytest.raises(ValueError, match="cardioid takes no parameters"):
        complex_activation(z, "cardioid", row)
    with pytest.raises(ValueError, match="offset has shape"):
        complex_activation(z, "mod_relu", torch.ones(2, 3))
