from __future__ import annotations

import pytest
import torch
from support.rounding import assert_as_accurate

from muse.layers import ComplexLayerNorm, ComplexRMSNorm
from muse.planar import from_complex, multiply, to_complex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [ComplexRMSNorm, ComplexLayerNorm]


def plain_rms_norm(z, gain, eps=1e-6):
    c = torch.complex(z[..., 0, :], z[..., 1, :])
    normal = c / (c.abs().square().mean(-1, keepdim=True) + eps).sqrt()
    return from_complex(normal * torch.complex(gain[0], gain[1]))


def planar_rms_norm(z, gain, eps=1e-6):
    """The same maths without complex numbers, which half precision does not have."""
    mean = z.square().sum(-2, keepdim=True).mean(-1, keepdim=True)
    return multiply(z * (mean + eps).rsqrt(), gain)


def randomise(norm):
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def turned(z, angle):
    return from_complex(to_complex(z) * torch.polar(torch.ones(()).double(), torch.tensor(angle).double()))


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 2, 63), (2, 5, 2, 65), (2, 7)])
def test_rms_norm_is_its_formula(shape):
    norm = randomise(ComplexRMSNorm(shape[-1])).double()
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = norm(z), plain_rms_norm(z, norm.gain)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    got = torch.autograd.grad(y, (z, norm.gain), cotangent)
    for actual, wanted in zip(got, torch.autograd.grad(expected, (z, norm.gain), cotangent), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 2, 2, 4), (2, 5)])
def test_gradcheck(norm_type, shape):
    norm = randomise(norm_type(shape[-1])).double()
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = list(norm.parameters())

    def function(z, *_):
        return norm(z)

    assert torch.autograd.gradcheck(function, (z, *parameters))


def test_rms_norm_turns_with_its_input():
    norm = randomise(ComplexRMSNorm(9)).double()
    z = torch.randn(4, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(norm(turned(z, 0.7)), turned(norm(z), 0.7))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_rms_norm_starts_with_unit_mean_square(scale):
    y = ComplexRMSNorm(64)(torch.randn(8, 2, 64) * scale)
    torch.testing.assert_close(
        y.square().sum(-2).mean(-1), torch.ones(8), rtol=1e-2 if scale < 1 else 1e-5, atol=0
    )


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_layer_norm_starts_white_with_unit_mean_square(correlation):
    re = torch.randn(6, 512, dtype=torch.float64)
    im = correlation * re + 0.1 * torch.randn_like(re) + 3
    y = ComplexLayerNorm(512).double()(torch.stack((re, im), dim=-2))
    torch.testing.assert_close(y.mean(-1), torch.zeros(6, 2, dtype=torch.float64))
    covariance = y @ y.mT / 512
    # The offset of 1e-6 on the variance of the smaller plane, 1e-2, is 1e-4 of it.
    half = torch.eye(2, dtype=torch.float64).expand(6, 2, 2) / 2
    torch.testing.assert_close(covariance, half, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        y.square().sum(-2).mean(-1), torch.ones(6, dtype=torch.float64), atol=2e-4, rtol=0
    )


def test_layer_norm_removes_any_linear_map_of_the_planes():
    norm = ComplexLayerNorm(64).double()
    z = torch.randn(3, 2, 64, dtype=torch.float64)
    white = norm(z)
    mixed = norm(torch.tensor([[1.0, 0.4], [0.4, 2.0]], dtype=torch.float64) @ white + 5)
    # Whitening by the symmetric root undoes a symmetric map of white data.
    torch.testing.assert_close(mixed, white, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_per_token(norm_type, dtype):
    norm = randomise(norm_type(17)).to(dtype)
    z = torch.randn(2, 5, 2, 17).to(dtype)
    before = norm(z)
    other = z.clone()
    other[:, -1] *= 50
    other[:, -1] += 3
    after = norm(other)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    # Alone, its sums may be taken in another order: in float32, before the one rounding of the result.
    alone, eps = norm(z[:, :1]), torch.finfo(dtype).eps
    torch.testing.assert_close(alone, before[:, :1], rtol=2 * eps, atol=50 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_half_precision_keeps_statistics_in_float32(norm_type, dtype, scale):
    norm = norm_type(256)
    z = (torch.randn(4, 2, 256).clamp(-3, 3) * scale).to(dtype).requires_grad_()
    y = norm.to(dtype)(z)
    assert y.dtype == dtype
    exact = norm.double()(z.detach().double())
    # One rounding at the end and one of each parameter, none within.
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    y.float().square().sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "width"), [*zip(DTYPES, [65, 1, 63]), (torch.bfloat16, 65)])
def test_rms_norm_accuracy(dtype, width):
    z, gain = torch.randn(5, 2, width).to(dtype), torch.randn(2, width).to(dtype)
    cotangent = torch.randn(5, 2, width).to(dtype)
    norm = ComplexRMSNorm(width).to(dtype)
    with torch.no_grad():
        norm.gain.copy_(gain)

    def run(function, kind):
        leaves = [z.to(kind).requires_grad_(), gain.to(kind).requires_grad_()]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(kind))]

    z_leaf = z.clone().requires_grad_()
    out = norm(z_leaf)
    results = [out, *torch.autograd.grad(out, (z_leaf, norm.gain), cotangent)]
    exact = run(planar_rms_norm, torch.float64)
    assert_as_accurate(results, lambda: run(planar_rms_norm, dtype), exact)


@pytest.mark.parametrize("norm_type", NORMS)
def test_input_need_not_be_contiguous(norm_type):
    norm = randomise(norm_type(6)).double()
    z = torch.randn(2, 5, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    packed = z.detach().contiguous().requires_grad_()
    torch.testing.assert_close(norm(z), norm(packed))
    cotangent = torch.randn(6, 2, 5, dtype=torch.float64).permute(2, 1, 0)
    got = torch.autograd.grad(norm(z), z, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(norm(packed), packed, cotangent))


def degenerate(kind, scale):
    z = torch.randn(3, 2, 32) * scale
    match kind:
        case "zero":
            return torch.zeros_like(z)
        case "constant":
            return torch.full_like(z, 0.7 * scale)
        case "real":
            z[:, 1] = 0
        case "dependent":
            z[:, 1] = -2 * z[:, 0]
        case "equal":
            z[:, 1] = z[:, 0]
    return z


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("kind", ["zero", "constant", "real", "dependent", "equal"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_inputs(norm_type, kind, scale, dtype):
    norm = norm_type(32).to(dtype)
    z = degenerate(kind, scale).to(dtype).requires_grad_()
    y = norm(z)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in norm.parameters())
    # A normalised state is of order one whatever came in: 32 channels cannot exceed sqrt(32) by much.
    assert y.abs().max() < 10


def test_rms_norm_refuses_double_backward():
    """Its backward pass takes the statistics as constants, so a second derivative would be wrong."""
    norm = ComplexRMSNorm(4)
    z = torch.randn(3, 2, 4, requires_grad=True)

    def second_derivative():
        (gradient,) = torch.autograd.grad(norm(z).pow(3).sum(), z, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError):
        second_derivative()
