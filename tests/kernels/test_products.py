from __future__ import annotations

import pytest
import torch

from kernels import products
from kernels.products import addmm, linear, matmul, mm

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_instructions(monkeypatch):
    """A processor that multiplies nothing in half precision."""
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: False)


def factors(dtype, *batch):
    return torch.randn(*batch, 9, 300).to(dtype), torch.randn(*batch, 300, 7).to(dtype)


def assert_rounded(found, exact, dtype):
    """Once, with room for the error of a float32 sum before."""
    assert found.dtype == dtype
    bound = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 * exact.abs().max().item()}
    torch.testing.assert_close(found.double(), exact, **bound)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_instructions")
def test_products_are_rounded_once(dtype):
    for batch in ((), (2, 3)):
        left, right = factors(dtype, *batch)
        assert_rounded(matmul(left, right), left.double() @ right.double(), dtype)
    left, right = factors(dtype)
    exact = left.double() @ right.double()
    with torch.autocast("cpu", dtype):
        assert_rounded(matmul(left, right), exact, dtype)
    bias = torch.randn(7).to(dtype)
    assert_rounded(linear(left, right.t(), bias), exact + bias.double(), dtype)
    assert_rounded(linear(left.view(3, 3, 300), right.t()), exact.view(3, 3, 7), dtype)
    out = torch.full_like(exact, torch.nan, dtype=dtype)
    assert_rounded(addmm(out, left, right, beta=0.0, out=out), exact, dtype)
    before = out.double()
    assert_rounded(addmm(out, left, right, out=out), before + exact, dtype)
    assert_rounded(mm(left, right, out=out), exact, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_instructions")
def test_gradients_of_what_is_kept_in_half_precision(dtype):
    x, weight = torch.randn(4, 5, 300).to(dtype), torch.randn(7, 300).to(dtype)
    leaves = [y.requires_grad_() for y in (x, weight, torch.randn(7).to(dtype))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.dtype) or y, lambda y: y):
        out = linear(*leaves)
    assert set(kept) == {dtype}
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    rows, above = x.double().flatten(0, 1), grad.double().flatten(0, 1)
    expected = ((above @ weight.double()).view(4, 5, 300), above.t() @ rows, above.sum(0))
    for y, exact in zip(found, expected, strict=True):
        assert_rounded(y, exact, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_instructions")
def test_products_of_many_matrices_have_gradients(dtype):
    left, right = (x.requires_grad_() for x in factors(dtype, 2))
    out = matmul(left, right)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (left, right), grad)
    expected = (grad.double() @ right.double().mT, left.double().mT @ grad.double())
    for x, exact in zip(found, expected, strict=True):
        assert_rounded(x, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_with_instructions_products_are_those_of_torch(monkeypatch, dtype):
    monkeypatch.setattr(products, "_has_instructions", lambda _: True)
    left, right = factors(dtype)
    assert torch.equal(matmul(left, right), left @ right)
    assert torch.equal(mm(left, right, out=torch.empty(9, 7, dtype=dtype)), left @ right)


@pytest.mark.usefixtures("no_instructions")
def test_float32_needs_none_and_other_devices_have_their_own():
    left, right = factors(torch.float32)
    assert torch.equal(matmul(left, right), left @ right)
    assert not products._is_rounded(torch.empty(0, dtype=torch.bfloat16, device="meta"))
