from __future__ import annotations

import pytest
import torch

from muse.planar import MODULUS_FLOOR, conjugate, from_complex, modulus, multiply, to_complex, upcast

COMPLEX = [torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3, 7)])
def test_conversion_round_trip(dtype, shape):
    c = torch.randn(shape, dtype=dtype)
    z = from_complex(c)
    assert z.shape == (*shape[:-1], 2, shape[-1])
    assert z.dtype == c.real.dtype
    assert torch.equal(z[..., 0, :], c.real)
    assert torch.equal(z[..., 1, :], c.imag)
    assert torch.equal(to_complex(z), c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_becomes_complex64(dtype):
    z = torch.randn(3, 2, 5).to(dtype)
    c = to_complex(z)
    assert c.dtype == torch.complex64
    assert torch.equal(from_complex(c).to(dtype), z)


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("shapes", [((4, 6), (4, 6)), ((3, 4, 6), (6,)), ((4, 1), (4, 6))])
def test_multiply_and_conjugate_agree_with_torch(dtype, shapes):
    a, b = (torch.randn(shape, dtype=dtype) for shape in shapes)
    torch.testing.assert_close(to_complex(multiply(from_complex(a), from_complex(b))), a * b)
    assert torch.equal(to_complex(conjugate(from_complex(a))), a.conj().resolve_conj())


def test_functions_do_not_need_contiguous_planes():
    z = torch.randn(2, 4, 3, dtype=torch.float64).transpose(0, 1)
    torch.testing.assert_close(to_complex(multiply(z, z)), to_complex(z).square())


def test_modulus_and_its_gradient_at_zero():
    z = torch.randn(4, 2, 5, dtype=torch.float64)
    z[0, :, 0] = 0
    z.requires_grad_()
    size = modulus(z)
    expected = to_complex(z.detach()).abs().clamp(min=MODULUS_FLOOR)
    torch.testing.assert_close(size, expected, atol=1e-10, rtol=0)
    assert (size >= MODULUS_FLOOR).all()
    (gradient,) = torch.autograd.grad(size.sum(), z)
    assert gradient.isfinite().all()
    assert (gradient[0, :, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_upcast_only_widens_half_precision(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert upcast(torch.zeros(2, 1, dtype=dtype)).dtype == expected
