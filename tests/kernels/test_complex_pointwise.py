from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_as_accurate

from kernels import chunks, complex_norm, complex_rotary
from kernels import complex_activation as complex_activation_ops
from kernels.complex_activation import ACTIVATIONS, complex_activation
from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm
from kernels.complex_rotary import rotate, split_heads
from kernels.launch import TARGETS, compiling_for
from kernels.planar import MODULUS_FLOOR, modulus, modulus_floor, upcast
from kernels.triton_import import triton
from muse.planar import conjugate, multiply

FILES = [complex_norm.triton_code, complex_activation_ops.triton_code, complex_rotary.triton_code]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATIONS = ["rms_norm", "add_rms_norm", "layer_norm", *ACTIVATIONS, "rotate", "rotate_back", "split_heads"]
# With 1 real number at a time each token is a chunk of its own; 40 leaves an incomplete last chunk.
CHUNKS = [1, 40, 2**18]


def table_of(length, width, start=0):
    omega = 100.0 ** (-torch.arange(width, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(start, start + length).double(), omega)
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def as_complex(z):
    return torch.complex(z[..., 0, :], z[..., 1, :])


def as_planar(c):
    return torch.stack((c.real, c.imag), dim=-2)


def turned(z, angle):
    return as_planar(as_complex(z) * torch.polar(torch.ones(()).double(), torch.tensor(angle).double()))


def plain_rms_norm(z, gain, eps=1e-6):
    x = upcast(z)
    normal = x / (x.square().sum((-2, -1), keepdim=True) / z.shape[-1] + eps).sqrt()
    return multiply(normal, upcast(gain)).to(z.dtype)


def plain_layer_norm(z, gamma, beta, eps=1e-6):
    """The definition, with the inverse root of each token's covariance by its eigenvalues."""
    x = upcast(z)
    x = x - x.mean(-1, keepdim=True)
    covariance = x @ x.mT / z.shape[-1] + eps * torch.eye(2, dtype=x.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    re, im = (vectors @ (values.rsqrt()[..., None] * vectors.mT) @ x).unbind(-2)
    g_rr, g_ii, g_ri = upcast(gamma)
    out = torch.stack((g_rr * re + g_ri * im, g_ri * re + g_ii * im), dim=-2) + upcast(beta)
    return out.to(z.dtype)


def plain_activation(z, kind, offset=None, slope=None):
    x = upcast(z)
    size = modulus(x, modulus_floor(z.dtype) if kind == "mod_relu" else MODULUS_FLOOR)
    match kind:
        case "mod_relu":
            gate = F.relu(size + upcast(offset)) / size
        case "mod_swish":
            gate = torch.sigmoid(upcast(slope) * size + upcast(offset))
        case "cardioid":
            gate = (1 + x[..., 0, :] / size) / 2
        case "split_gelu":
            return F.gelu(z)
        case "z_relu":
            gate = (x > 0).all(-2).to(x.dtype)
    return (x * gate.unsqueeze(-2)).to(z.dtype)


def plain_rotate(z, table, inverse=False):
    turn = table.to(upcast(z).dtype)
    return multiply(upcast(z), conjugate(turn) if inverse else turn).to(z.dtype)


def plain_split_heads(projection, table, heads, kv_heads):
    q, k, v = projection.permute(0, 3, 1, 2, 4).split((heads, kv_heads, kv_heads), dim=1)
    return plain_rotate(q, table), plain_rotate(k, table), v.contiguous()


def case(name, length=6, width=5, dtype=torch.float64, batch=2):
    """An operation, the same in plain PyTorch, and leaves for both."""
    z, other = (torch.randn(batch, length, 2, width).to(dtype) for _ in range(2))
    gain, gamma = torch.randn(2, width).to(dtype), torch.randn(3, width).to(dtype)
    offset, slope = torch.linspace(-1, 0.8, width).to(dtype), torch.linspace(-1, 2, width).to(dtype)
    table = table_of(length, width).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if name == "rms_norm":
        return complex_rms_norm, plain_rms_norm, [z, gain]
    if name == "add_rms_norm":

        def plain_add(z, branch, gain):
            total = z + branch
            return total, plain_rms_norm(total, gain)

        return add_complex_rms_norm, plain_add, [z, other, gain]
    if name == "layer_norm":
        return complex_layer_norm, plain_layer_norm, [z, gamma, gain]
    if name in ACTIVATIONS:
        leaves = [z, offset, slope][: 1 + ACTIVATIONS[name]]
        return (
            lambda z, *p: complex_activation(z, name, *p),
            lambda z, *p: plain_activation(z, name, *p),
            leaves,
        )
    if name == "split_heads":
        projection = torch.randn(batch, length, 2, 3 + 2 * 2, width).to(dtype)
        return (
            lambda x: split_heads(x, table, 3, 2),
            lambda x: plain_split_heads(x, table, 3, 2),
            [projection],
        )
    back = name == "rotate_back"
    return lambda z: rotate(z, table, back), lambda z: plain_rotate(z, table, back), [z]


def results(function, leaves, seed=1):
    """Outputs, then gradients of all leaves for random gradients of all outputs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_gradients_are_those_of_the_definition(name, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    function, plain, leaves = case(name)
    for actual, expected in zip(results(function, leaves), results(plain, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


SIZES = [(1, 1), (3, 63), (7, 65)]


# Every two of these choices meet.
@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [(name, DTYPES[k], SIZES[(n + k) % 3]) for n, name in enumerate(OPERATIONS) for k in range(3)],
)
def test_accuracy(name, dtype, sizes):
    if name == "layer_norm" and sizes[1] == 1:
        # The eigenvectors of the definition have no gradient there; see the next test.
        sizes = (2, 17)
    function, plain, leaves = case(name, *sizes, dtype=dtype)
    exact = results(plain, [leaf.double() for leaf in leaves])
    assert_as_accurate(results(function, leaves), lambda: results(plain, leaves), exact)


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


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_change_a_bit(name, dtype, monkeypatch):
    # Whole vectors in every chunk: the last few numbers may go through other code of torch.
    function, _, leaves = case(name, length=9, width=16, dtype=dtype)
    with torch.no_grad():
        whole = function(*leaves)
        monkeypatch.setattr(chunks, "CHUNK", 70)
        apart = function(*leaves)
    whole, apart = (x if isinstance(x, tuple) else (x,) for x in (whole, apart))
    assert all(map(torch.equal, whole, apart))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ACTIVATIONS])
def test_gradcheck(name):
    function, _, leaves = case(name, length=3, width=4)
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradcheck_away_from_kinks(kind):
    # Moduli of 0.5 or 1.7 and phases off the axes: clear of |z| = 0, of |z| = 1 and of the quadrants' edges.
    radius = torch.tensor([0.5, 1.7]).double()[torch.randint(2, (4, 5))]
    angle = 0.4 + 0.6 * torch.rand(4, 5).double() + math.pi / 2 * torch.randint(4, (4, 5))
    leaves = [as_planar(torch.polar(radius, angle)), torch.full((5,), -1.0).double(), torch.randn(5).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves[: 1 + ACTIVATIONS[kind]]]
    assert torch.autograd.gradcheck(lambda z, *p: complex_activation(z, kind, *p), leaves)


@pytest.mark.parametrize("name", OPERATIONS)
def test_registration(name):
    """opcheck of the forward op and, on what the former returned, of the backward op."""
    # Statistics are float32 then: a dtype other than that of the state.
    leaves = [leaf.requires_grad_() for leaf in case(name, dtype=torch.bfloat16)[2]]
    z, *rest = leaves
    check = torch.library.opcheck
    if name == "rms_norm":
        check(complex_norm._complex_rms_norm, (z, *rest, 1e-6))
        rstd = complex_norm._complex_rms_norm(z, *rest, 1e-6)[1]
        check(complex_norm._complex_rms_norm_backward, (z.detach(), z.detach(), rest[0].detach(), rstd, None))
    elif name == "add_rms_norm":
        check(complex_norm._add_complex_rms_norm, (*leaves, 1e-6))
        total, normal, rstd = (x.detach() for x in complex_norm._add_complex_rms_norm(*leaves, 1e-6))
        check(complex_norm._complex_rms_norm_backward, (normal, total, rest[1].detach(), rstd, z.detach()))
    elif name == "layer_norm":
        check(complex_norm._complex_layer_norm, (*leaves, 1e-6))
        statistics = complex_norm._complex_layer_norm(*leaves, 1e-6)[1]
        arguments = (z.detach(), z.detach(), rest[0].detach(), statistics, 1e-6)
        check(complex_norm._complex_layer_norm_backward, arguments)
    elif name in ACTIVATIONS:
        offset, slope = (*rest, None, None)[:2]
        check(complex_activation_ops._complex_activation, (z, name, offset, slope))
        parameters = (None if p is None else p.detach() for p in (offset, slope))
        check(complex_activation_ops.complex_activation_backward, (z.detach(), z.detach(), name, *parameters))
    elif name == "split_heads":
        table = table_of(6, 5).float()
        check(complex_rotary._complex_split_heads, (z, table, 3, 2))
        parts = (x.detach() for x in split_heads(z, table, 3, 2))
        check(complex_rotary._complex_split_heads_backward, (*parts, table))
    else:
        check(complex_rotary._complex_rotate, (z, table_of(6, 5).float(), name == "rotate_back"))


@pytest.mark.slow
def test_compiles_in_one_graph():
    cases = [case(name, dtype=torch.float32) for name in OPERATIONS]
    leaves = [leaf for *_, own in cases for leaf in own]

    def everything(*leaves):
        outputs, rest = [], list(leaves)
        for function, _, own in cases:
            output = function(*(rest.pop(0) for _ in own))
            outputs += output if isinstance(output, tuple) else (output,)
        return tuple(x * 2 for x in outputs)

    compiled = torch.compile(everything, fullgraph=True)
    for actual, expected in zip(results(compiled, leaves), results(everything, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_repeated_backward_is_bitwise_equal(name):
    function, _, leaves = case(name, length=40, width=33, dtype=torch.float32)
    assert all(map(torch.equal, results(function, leaves), results(function, leaves)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_input_need_not_be_contiguous(name):
    function, _, leaves = case(name)
    spread = [
        leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf[:, None].repeat(1, 2)[:, 0] for leaf in leaves
    ]
    assert not any(leaf.is_contiguous() for leaf in spread)
    for actual, expected in zip(results(function, spread), results(function, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_need_not_be_contiguous(name):
    function, _, leaves = case(name)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The gradient of a sum is one number seen as a tensor.
    expected = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], retain_graph=True)
    got = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens(name):
    function, _, leaves = case(name, batch=0)
    out, *_, last = results(function, leaves)
    assert out.numel() == 0
    assert (last == 0).all()


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in ("rotate", "rotate_back", "split_gelu")]
)
def test_refuses_a_second_derivative(name):
    """The backward passes take statistics as constants, so a second derivative would be wrong."""
    function, _, leaves = case(name)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def second_derivative():
        out = function(*leaves)
        out = out[-2] if isinstance(out, tuple) else out
        (gradient, *_) = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True, allow_unused=True)
        gradient.square().sum().backward()

    if name == "add_rms_norm":
        z, branch, gain = leaves
        loss = add_complex_rms_norm(z, branch, gain)[1].pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()
    else:
        with pytest.raises(RuntimeError):
            second_derivative()


def saved_bytes(function, leaves):
    """Bytes kept for the backward pass beyond the leaves, by storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    own = {x.untyped_storage().data_ptr() for x in outputs}
    return sum(size for at, size in kept.items() if at not in own)


@pytest.mark.parametrize(
    ("name", "bytes_a_token"),
    [("rms_norm", 4), ("add_rms_norm", 4), ("layer_norm", 20), *((kind, 0) for kind in ACTIVATIONS)],
)
def test_keeps_a_few_numbers_a_token(name, bytes_a_token):
    function, _, leaves = case(name, length=32, width=64, dtype=torch.bfloat16)
    assert saved_bytes(function, leaves) == 2 * 32 * bytes_a_token


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


@pytest.mark.parametrize("name", ["rms_norm", "mod_relu", "mod_swish"])
@pytest.mark.parametrize("angle", [0.3, math.pi / 2, 3.0])
def test_turns_with_its_input(name, angle):
    function, _, (z, *parameters) = case(name)
    torch.testing.assert_close(
        function(turned(z, angle), *parameters), turned(function(z, *parameters), angle)
    )


@pytest.mark.parametrize("name", ["split_gelu", "cardioid", "z_relu"])
def test_does_not_turn_with_its_input(name):
    function, _, (z,) = case(name)
    assert (function(turned(z, 1.0)) - turned(function(z), 1.0)).abs().max() > 0.1


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
        complex_activation_ops.triton_code._activation_triton(z, "mod_relu", z[0, 0], None)
    (program,) = programs
    assert "div.rn.f32" in program
    assert "div.full" not in program


def test_mod_relu_switches_units_off():
    z, offset = torch.randn(200, 2, 8).double(), torch.full((8,), -1.2).double()
    off = (complex_activation(z, "mod_relu", offset) == 0).all(-2)
    assert torch.equal(off, as_complex(z).abs() <= 1.2)
    assert 0.3 < off.double().mean() < 0.7


def scores(q, k):
    """q_n conj(k_m) of every two positions, per channel: (S, S, D)."""
    return as_complex(q)[:, None] * as_complex(k)[None].conj()


def test_scores_of_rotated_states_depend_on_relative_positions_only():
    q, k = torch.randn(2, 7, 2, 3, dtype=torch.float64)

    def turned_at(shift):
        table = table_of(7, 3, start=shift)
        return rotate(q, table), rotate(k, table)

    base, moved = turned_at(0), turned_at(40)
    torch.testing.assert_close(scores(*base), scores(*moved))
    # Without the conjugate positions would add up.
    products = [as_complex(q)[:, None] * as_complex(k)[None] for q, k in (base, moved)]
    assert (products[0] - products[1]).abs().max() > 0.1
    # Nor may a difference of positions go unnoticed.
    assert (scores(base[0], moved[1]) - scores(*base)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_inverse_rotation_undoes_rotation(dtype):
    z, table = torch.randn(2, 3, 9, 2, 5).to(dtype), table_of(9, 5)
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * z.abs().max().item()}
    torch.testing.assert_close(rotate(rotate(z, table), table, inverse=True), z, **tolerance)
    assert (rotate(rotate(z, table), table) - z).abs().max() > 0.1


def test_rotation_has_a_second_derivative():
    z, table = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True), table_of(3, 4)
    assert torch.autograd.gradgradcheck(lambda z: rotate(z, table), z)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (4, 4)])
def test_split_heads_gives_contiguous_heads(sizes):
    heads, kv_heads = sizes
    projection = torch.randn(2, 1, 2, heads + 2 * kv_heads, 5)
    parts = split_heads(projection, table_of(1, 5), heads, kv_heads)
    assert [x.shape for x in parts] == [(2, count, 1, 2, 5) for count in (heads, kv_heads, kv_heads)]
    assert all(x.is_contiguous() for x in parts)
    assert torch.equal(parts[2].permute(0, 2, 3, 1, 4), projection[:, :, :, -kv_heads:])


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
    with pytest.raises(ValueError, match=r"unknown activation tanh; choose one of mod_relu"):
        complex_activation(z, "tanh")
    with pytest.raises(ValueError, match="mod_relu takes offset only"):
        complex_activation(z, "mod_relu")
    with pytest.raises(ValueError, match="mod_swish takes offset and slope"):
        complex_activation(z, "mod_swish", gain[0])
    with pytest.raises(ValueError, match="cardioid takes no parameters"):
        complex_activation(z, "cardioid", gain[0])
    with pytest.raises(ValueError, match="offset has shape"):
        complex_activation(z, "mod_relu", gain)
    with pytest.raises(ValueError, match="does not fit a table"):
        rotate(z, table_of(5, 3))
    with pytest.raises(ValueError, match="do not fit 2 query heads and 1 key"):
        split_heads(torch.randn(1, 4, 2, 5, 3), table_of(4, 3), 2, 1)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_pinned_configurations_cover_every_width(target):
    for kernel, table in (pair for file in FILES for pair in file.PINNED.table.items()):
        for bits in ("16", "32"):
            widths = {int(width): options for width, options in table[target.name][bits].items()}
            assert list(widths) == ([1024, 4096, 8192] if "norm" in kernel else [1])
            for width, options in widths.items():
                assert options["TILE"] >= (width if "norm" in kernel else options["COLUMNS"])
                assert ("PROGRAMS" in options) == ("backward" in kernel)


def test_every_kernel_is_compiled_ahead_of_time():
    seen = set()

    def compiler(kernel, arguments, options):
        seen.add(kernel.__name__)
        widths.add(options.get("BLOCK_D"))

    widths = set()
    with compiling_for(TARGETS[0], compiler), torch.device("meta"):
        for call in (call for file in FILES for call in file.compile_cases().values()):
            call()
    kernels = {name for file in FILES for name in vars(file) if name.endswith("_kernel")}
    assert seen == kernels
    assert {1024, 4096, 8192} <= widths


def test_too_many_channels_for_the_registers():
    z = torch.empty(4, 2, 8193, device="meta")
    with (
        compiling_for(TARGETS[0], lambda *_: None),
        pytest.raises(ValueError, match="complex_norm: width 8193 is too large; at most 8192"),
    ):
        complex_norm.triton_code._rms_norm_triton(z, None, z[0], 1e-6)
