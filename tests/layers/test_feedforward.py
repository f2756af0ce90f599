from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from muse.layers import ComplexFFN

ACTIVATIONS = ["split_gelu", "mod_relu", "mod_swish", "cardioid", "z_relu"]
DTYPES = [torch.float32, torch.bfloat16]


def plain(ffn, z):
    return ffn.down(ffn.activation(ffn.up(z)))


def gradients(function, ffn, z, cotangent):
    z = z.detach().requires_grad_()
    out = function(z)
    return [out.detach(), *torch.autograd.grad(out, (z, *ffn.parameters()), cotangent.to(out.dtype))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_no_bit(activation, dtype, autocast):
    ffn = ComplexFFN(10, 24, activation).to(dtype)
    z, cotangent = torch.randn(2, 3, 7, 2, 10).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = gradients(lambda z: plain(ffn, z), ffn, z, cotangent)
        recomputed = gradients(ffn, ffn, z, cotangent)
    for expected, actual in zip(kept, recomputed, strict=True):
        assert torch.equal(expected, actual)
    assert recomputed[1].abs().max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [True, False])
def test_activated_hidden_state_is_not_kept(activation, dtype, recompute):
    ffn = ComplexFFN(10, 24, activation).to(dtype)
    activated = []
    ffn.down.register_forward_pre_hook(
        lambda _, args: activated.append(StorageWeakRef(args[0].untyped_storage()))
    )
    z = torch.randn(3, 7, 2, 10).to(dtype).requires_grad_()
    out = ffn(z) if recompute else plain(ffn, z)
    assert out.requires_grad
    assert len(activated) == 1
    # The unchanged form shows that the observation works: there the second map keeps it.
    assert activated[0].expired() == recompute


def test_activation_is_computed_again_in_the_backward_pass_only():
    ffn = ComplexFFN(10, 24)
    calls = []
    ffn.activation.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    z = torch.randn(3, 2, 10)
    with torch.no_grad():
        ffn(z)
    out = ffn(z)
    # The forward pass takes it together with the product.
    assert calls == []
    out.sum().backward()
    assert calls == [False]


def test_backward_twice():
    ffn = ComplexFFN(6, 8, "mod_swish")
    z = torch.randn(3, 2, 6, requires_grad=True)
    loss = ffn(z).square().sum()
    first = torch.autograd.grad(loss, z, retain_graph=True)
    second = torch.autograd.grad(loss, z)
    assert torch.equal(first[0], second[0])


def test_gradcheck():
    ffn = ComplexFFN(3, 4).double()
    z = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: ffn(z), (z, *ffn.parameters()))


def test_gain_scales_the_output():
    z = torch.randn(400, 2, 32) / 2**0.5
    sizes = []
    for gain in (1.0, 0.25):
        torch.manual_seed(0)
        sizes.append(ComplexFFN(32, 64, gain=gain)(z).square().mean().sqrt())
    torch.testing.assert_close(sizes[1] / sizes[0], torch.tensor(0.25))
