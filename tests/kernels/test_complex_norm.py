from __future__ import annotations

import math

import pytest
import torch
from support.pointwise import DTYPES, case, results

from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm, triton_code
from kernels.launch import TARGETS, compiling_for


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_layer_norm_of_one_channel_is_its_offset(dtype):
    """A channel less its mean is 0."""
    function, _, (z, gamma, beta) = case("layer_norm", 3, 1, dtype)
    y, by_z, by_gamma, by_beta = results(function, [z, gamma, beta])
    assert torch.equal(y, beta.expand_as(y))
    assert (by_z == 0).all()
    assert (by_gamma == 0).all()
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(by_beta, cotangent.sum((0, 1)))


def test_sum_and_norm_are_those_of_the_two_operations():
    for dtype in DTYPES:
        _, _, (z, branch, gain) = case("add_rms_norm", width=33, dtype=dtype)
        total, normal = add_complex_rms_norm(z, branch, gain)
        assert torch.equal(total, z + branch)
        assert torch.equal(normal, complex_rms_norm(z + branch, gain))


@pytest.mark.parametrize("used", [0, 1])
def test_sum_and_norm_with_one_output_used(used):
    function, plain, leaves = case("add_rms_norm")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    cotangent = torch.randn_like(leaves[0])
    got, expected = (
        torch.autograd.grad(f(*leaves)[used], leaves, cotangent, allow_unused=True) for f in (function, plain)
    )
    for actual, wanted in zip(got, expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(actual, wanted)


def test_sum_and_norm_leave_the_gradients_of_both_terms_apart():
    """Both get the same values; changing one .grad must not change the other."""
    _, _, leaves = case("add_rms_norm")
    z, branch, gain = (leaf.requires_grad_() for leaf in leaves)
    total, normal = add_complex_rms_norm(z, branch, gain)
    (total.sum() + normal.sum()).backward()
    before = branch.grad.clone()
    z.grad.zero_()
    assert torch.equal(branch.grad, before)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_rms_norm_starts_with_unit_mean_square(scale):
    gain = torch.stack((torch.ones(64), torch.zeros(64)))
    y = complex_rms_norm(torch.randn(8, 2, 64) * scale, gain)
    rtol = 1e-2 if scale < 1 else 1e-5
    torch.testing.assert_close(y.square().sum(-2).mean(-1), torch.ones(8), rtol=rtol, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_layer_norm_starts_white_with_unit_mean_square(correlation):
    re = torch.randn(6, 512, dtype=torch.float64)
    im = correlation * re + 0.1 * torch.randn_like(re) + 3
    gamma = torch.tensor([[1.0], [1.0], [0.0]]).double().div(math.sqrt(2)).repeat(1, 512)
    y = complex_layer_norm(torch.stack((re, im), dim=-2), gamma, torch.zeros(2, 512).double())
    torch.testing.assert_close(y.mean(-1), torch.zeros(6, 2, dtype=torch.float64))
    # eps = 1e-6 on the variance of the smaller plane, 1e-2, is 1e-4 of it.
    half = torch.eye(2, dtype=torch.float64).expand(6, 2, 2) / 2
    torch.testing.assert_close(y @ y.mT / 512, half, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_per_token(name, dtype):
    function, _, (z, *parameters) = case(name, length=5, width=17, dtype=dtype)
    before = results(lambda z: function(z, *parameters), [z])
    other = z.clone()
    other[:, -1] = other[:, -1] * 50 + 3
    after = results(lambda z: function(z, *parameters), [other])
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :-1], y[:, :-1])
        assert not torch.equal(x[:, -1], y[:, -1])
    assert torch.equal(function(z[:, :1], *parameters), before[0][:, :1])


@pytest.mark.parametrize("kind", ["zero", "constant", "real", "dependent", "equal"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_degenerate_tokens_are_bounded(name, kind, scale, dtype):
    function, _, (_, *parameters) = case(name, width=32, dtype=dtype)
    z = torch.randn(3, 2, 32) * scale
    match kind:
        case "zero":
            z.zero_()
        case "constant":
            z.fill_(0.7 * scale)
        case "real":
            z[:, 1] = 0
        case "dependent":
            z[:, 1] = -1.7 * z[:, 0]
        case "equal":
            z[:, 1] = z[:, 0]
    y, *gradients = results(function, [z.to(dtype), *parameters])
    assert y.abs().max() < 30
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_layer_norm_of_nearly_dependent_planes_is_right():
    """The determinant is rounding there: what eps adds to it must survive."""
    re = 30 * torch.randn(20, 64)
    z = torch.stack((re, -1.7 * re), dim=-2)
    gamma = torch.tensor([[1.0], [1.0], [0.0]]).repeat(1, 64)
    y = complex_layer_norm(z, gamma, torch.zeros(2, 64))
    # White along the one direction that there is: |y|^2 has mean 1.
    torch.testing.assert_close(y.square().sum(-2).mean(-1), torch.ones(20), atol=0.05, rtol=0)


def test_too_many_channels_for_the_registers():
    z = torch.empty(4, 2, 8193, device="meta")
    with (
        compiling_for(TARGETS[0], lambda *_: None),
        pytest.raises(ValueError, match="complex_norm: width 8193 is too large; at most 8192"),
    ):
        triton_code.rms_norm(z, None, z[0], 1e-6)


def test_whitening_is_the_inverse_root_of_the_covariance():
    z = torch.randn(20, 2, 7, dtype=torch.float64)
    centred = z - z.mean(-1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred @ centred.mT / 7 + 1e-6 * torch.eye(2).double())
    white = vectors @ (values.rsqrt()[..., None] * vectors.mT) @ centred
    gamma = torch.tensor([[1.0], [1.0], [0.0]]).double().repeat(1, 7)
    torch.testing.assert_close(complex_layer_norm(z, gamma, torch.zeros(2, 7).double()), white)


def test_bad_input():
    z, gain = torch.randn(4, 2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"gain has shape \(2, 4\), not \(2, 3\)"):
        complex_rms_norm(z, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"planar tensor .* shape \(4, 3\)"):
        complex_rms_norm(torch.randn(4, 3), gain)
    with pytest.raises(ValueError, match="branch has shape"):
        add_complex_rms_norm(z, z[:1], gain)
    with pytest.raises(ValueError, match=r"branch has .* torch.bfloat16"):
        add_complex_rms_norm(z, z.bfloat16(), gain)
    with pytest.raises(ValueError, match="gamma has shape"):
        complex_layer_norm(z, gain, gain)
    with pytest.raises(ValueError, match="beta has shape"):
        complex_layer_norm(z, torch.ones(3, 3), gain[:1])
