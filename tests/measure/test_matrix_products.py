import pytest
import torch
import torch.nn.functional as F

from muse.layers import ComplexLinear
from muse.measure.matrix_products import ProductRecorder
from muse.measure.operations import InsideOperations


def recorded_flops(function):
    with ProductRecorder() as recorder, InsideOperations():
        function()
    products = recorder.products + recorder.attention_products
    return sum(product.flops() * count for product, count in products.items())


def test_a_complex_linear_is_one_real_product_forward_and_two_backward():
    layer = ComplexLinear(5, 7)
    z = torch.randn(3, 11, 2, 5, requires_grad=True)
    one = 2 * 33 * 10 * 14
    assert recorded_flops(lambda: layer(z)) == one
    assert recorded_flops(lambda: layer(z).sum().backward()) == 3 * one


def test_a_product_is_repeated_with_its_shapes_strides_and_dtype():
    left, right = torch.randn(4, 6).t().bfloat16(), torch.randn(4, 3).bfloat16()
    with ProductRecorder() as recorder, InsideOperations():
        left @ right
    ((product, count),) = recorder.products.items()
    again_left, again_right = product.factors(torch.device("cpu"))
    assert count == 1
    for ours, theirs in ((again_left, left), (again_right, right)):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize("width", [16, 32])
def test_causal_attention_counts_half_of_its_keys_twice_forward_and_five_times_backward(width):
    q, k, v = (torch.randn(2, 3, 64, width, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 64 * 32 * width

    def attend():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert recorded_flops(attend) == 2 * product
    assert recorded_flops(lambda: attend().sum().backward()) == 7 * product
