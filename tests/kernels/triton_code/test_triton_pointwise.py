from __future__ import annotations

import pytest
import torch
from support.dtypes import DTYPES, in_each_half
from support.pointwise import NORMS, OPERATIONS, case, results, scattered
from support.rounding import assert_as_accurate

from kernels.complex_activation import complex_activation
from kernels.complex_norm import add_complex_rms_norm, complex_rms_norm
from kernels.complex_rotary import split_heads


def check(function, plain, leaves):
    """Outputs and gradients against the plain formula in float64."""
    got = results(function, leaves)
    assert_as_accurate(got, lambda: results(plain, leaves), results(plain, leaves, torch.float64))
    return got


def alternating(names, variants):
    """Every operation in every variant, in one dtype or the other, so that each operation has both."""
    dtypes = (torch.float32, torch.float16)
    return in_each_half(
        [(name, x, dtypes[(n + k) % 2]) for n, name in enumerate(names) for k, x in enumerate(variants)]
    )


# In the interpreter a tile holds 64 numbers. (22, 5) gives each of the three programs of a backward pass two
# tiles, the last incomplete.
@pytest.mark.parametrize(
    ("name", "sizes", "dtype"), alternating(OPERATIONS, [(1, 1), (22, 5), (2, 63), (3, 65)])
)
def test_value_and_every_gradient(name, sizes, dtype, device):
    check(*case(name, *sizes, dtype, device=device))


@pytest.mark.parametrize(("name", "width", "dtype"), alternating([*NORMS, "mod_swish", "rotate"], [1025]))
def test_wide_tokens(name, width, dtype, device):
    check(*case(name, 1, width, dtype, device=device))


@pytest.mark.parametrize("name", OPERATIONS)
def test_neither_inputs_nor_gradients_need_be_contiguous(name, device):
    function, _, leaves = case(name, 3, 17, torch.float32, device=device)
    spread = results(function, scattered(leaves), spread=True)
    assert all(map(torch.equal, spread, results(function, leaves)))


@pytest.mark.parametrize(("name", "scale", "dtype"), alternating(OPERATIONS, [0.0, 1e-6, 100.0]))
def test_zeros_tiny_and_large_values(name, scale, dtype, device):
    assert all(x.isfinite().all() for x in check(*case(name, 3, 9, dtype, device=device, scale=scale)))


@pytest.mark.parametrize("kind", ["constant", "real", "imaginary", "dependent", "equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_degenerate_tokens(kind, dtype, device):
    function, _, (z, gamma, beta) = case("layer_norm", 3, 33, dtype, device=device, scale=100.0)
    re = z[..., 0, :].clone()
    match kind:
        case "constant":
            z.fill_(70.0)
        case "real":
            z[..., 1, :] = 0
        case "imaginary":
            z[..., 0, :] = 0
        case "dependent":
            z[..., 1, :] = -1.7 * re
        case "equal":
            z[..., 1, :] = re
    y, *gradients = results(function, [z, gamma, beta])
    assert y.abs().max() < 50
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", OPERATIONS)
def test_repeated_backward_is_bitwise_equal(name, device):
    function, _, leaves = case(name, 12, 9, torch.float32, device=device)
    assert all(map(torch.equal, results(function, leaves), results(function, leaves)))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_per_token(name, dtype, device):
    function, _, (z, *parameters) = case(name, 3, 9, dtype, device=device)
    other = z.clone()
    other[:, -1] = other[:, -1] * 50 + 3
    before, after = (results(lambda z: function(z, *parameters), [x]) for x in (z, other))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :-1], y[:, :-1])
        assert not torch.equal(x[:, -1], y[:, -1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mod_relu_without_offset_is_the_identity(dtype, device):
    z = torch.randn(30, 2, 9, device=device).to(dtype)
    assert torch.equal(complex_activation(z, "mod_relu", torch.zeros(9, dtype=dtype, device=device)), z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_rounded_sum(dtype, device):
    _, _, (z, branch, gain) = case("add_rms_norm", 3, 33, dtype, device=device)
    total, normal = add_complex_rms_norm(z, branch, gain)
    assert torch.equal(total, z + branch)
    assert torch.equal(normal, complex_rms_norm(total, gain))


def test_sum_and_norm_with_only_the_norm_used(device):
    *functions, leaves = case("add_rms_norm", 5, 9, torch.float32, device=device)
    check(*(lambda *leaves, f=f: f(*leaves)[1] for f in functions), leaves)


@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (5, 5)])
def test_heads_are_split_as_by_torch(heads, device):
    projection = torch.randn(2, 3, 2, heads[0] + 2 * heads[1], 33, device=device)
    table = torch.stack((torch.ones(3, 33), torch.zeros(3, 33)), dim=-2).to(device)
    q, k, v = projection.permute(0, 3, 1, 2, 4).split((heads[0], heads[1], heads[1]), dim=1)
    for actual, expected in zip(split_heads(projection, table, *heads), (q, k, v), strict=True):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous()


@pytest.mark.parametrize("name", [*NORMS, "mod_relu", "mod_swish"])
def test_parameters_may_be_float32_for_float16_states(name, device):
    """As under autocast."""
    function, plain, (z, *parameters) = case(name, 3, 9, torch.float16, device=device)
    if name == "add_rms_norm":
        leaves = [z, parameters[0], parameters[1].float()]
    else:
        leaves = [z, *(parameter.float() for parameter in parameters)]
    for actual, leaf in zip(check(function, plain, leaves)[-len(leaves) :], leaves, strict=True):
        assert actual.dtype == leaf.dtype


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens(name, device):
    function, _, leaves = case(name, 3, 9, torch.float32, batch=0, device=device)
    out, *_ = got = results(function, leaves)
    assert out.numel() == 0
    assert all((gradient == 0).all() for gradient in got[-len(leaves) :])
