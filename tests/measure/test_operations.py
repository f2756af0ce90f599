from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.complex_attention import complex_attention_forward
from kernels.complex_linear import complex_linear
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder
from muse.measure.operations import InsideOperations


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_outer_modes_see_what_an_operation_does():
    x, weight, bias = torch.randn(3, 2, 4), torch.randn(2, 5, 4), torch.randn(2, 5)
    expected = complex_linear(x, weight, bias)
    with Names() as closed:
        complex_linear(x, weight, bias)
    with Names() as opened, InsideOperations():
        assert torch.equal(complex_linear(x, weight, bias), expected)
    assert "addmm" not in closed.seen
    assert "addmm" in opened.seen
    assert not any("complex" in name for name in opened.seen)


def test_closed_operations_stay_one_call():
    q, k, v = torch.randn(3, 1, 2, 9, 2, 4)
    with Names() as names, InsideOperations(closed=COMPLEX_ATTENTION):
        complex_attention_forward(q, k, v, "phase", True)
    assert "complex_attention_forward" in names.seen
    assert "bmm" not in names.seen


@pytest.mark.parametrize(
    ("score", "forward", "backward"), [("real", 2, 5), ("magnitude", 3, 8), ("phase", 4, 10)]
)
def test_products_of_complex_attention(score, forward, backward):
    """Scores and weights are made of one or two real products over twice the channels."""
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 3, 64, 2, 8)]
    product = 2 * 2 * 3 * 64 * 32 * 16

    def flops(function):
        with ProductRecorder() as recorder, InsideOperations(closed=COMPLEX_ATTENTION):
            function()
        return sum(product.flops() * count for product, count in recorder.attention_products.items())

    assert flops(lambda: complex_attention_forward(*leaves, score, True)) == forward * product
    out, _ = complex_attention_forward(*leaves, score, True)
    assert flops(lambda: out.sum().backward()) == backward * product
