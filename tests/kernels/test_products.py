from __future__ import annotations

import pytest
import torch

from kernels import products
from kernels.products import linear, matmul, multiply_into, product_dtype

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_instructions(monkeypatch):
    """A processor that multiplies nothing in half precision."""
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: dtype not in HALF)


def factors(dtype, *batch):
    return torch.randn(*batch, 9, 300).to(dtype), torch.randn(*batch, 300, 7).to(dtype)


def rounded(exact, dtype):
    """Of float64, with room for the error of a float32 sum before the rounding."""
    return {"rtol": torch.finfo(dtype).eps, "atol": 1e-4 * exact.abs().max().item()}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_instructions")
def test_products_are_rounded_once(dtype):
    for batch in ((), (2, 3)):
        left, right = factors(dtype, *batch)
        exact = left.double() @ right.double()
        found = matmul(left, right)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, **rounded(exact, dtype))
    bias = torch.randn(7).to(dtype)
    left, right = factors(dtype)
    exact = left.double() @ right.double()
    torch.testing.assert_close(
        linear(left, right.t(), bias).double(), exact + bias.double(), **rounded(exact, dtype)
    )
    out = torch.full_like(exact, torch.nan, dtype=dtype)
    multiply_into(out, left, right)
    torch.testing.assert_close(out.double(), exact, **rounded(exact, dtype))
    multiply_into(out, left, right, beta=1.0)
    torch.testing.assert_close(out.double(), 2 * exact, **rounded(2 * exact, dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_instructions")
def test_gradients_keep_half_precision(dtype):
    left, right = (x.requires_grad_() for x in factors(dtype, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        out = matmul(left, right)
    assert set(kept) == {dtype}
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (left, right), grad)
    expected = (grad.double() @ right.double().mT, left.double().mT @ grad.double())
    for x, exact in zip(found, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), exact, **rounded(exact, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_the_precision_that_instructions_have_is_kept(monkeypatch, dtype):
    monkeypatch.setattr(products, "_has_instructions", lambda _: True)
    left, right = factors(dtype)
    assert product_dtype(left) == dtype
    assert torch.equal(matmul(left, right), left @ right)


def test_float32_and_float64_are_what_every_processor_multiplies():
    for dtype in (torch.float32, torch.float64):
        assert product_dtype(torch.empty(0, dtype=dtype)) == dtype


def test_a_device_that_is_no_processor_is_left_alone():
    assert product_dtype(torch.empty(0, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
