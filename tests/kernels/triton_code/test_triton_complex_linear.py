from __future__ import annotations

from functools import partial

import pytest
import torch
from support.dtypes import DTYPES, HALVES, in_each_half
from support.padding import padded
from support.rounding import assert_as_accurate

import kernels.complex_linear as implementation
from kernels.complex_activation import complex_activation
from kernels.complex_linear import PARAMETERS, PINNED, complex_linear, complex_linear_activated
from kernels.complex_linear.plain import linear, linear_activated
from kernels.launch import eager
from kernels.planar import modulus_floor

# Rows, in and out. The interpreter's blocks are 32 up to 64 features out, else 64.
ONE = (1, 1, 1)
ONE_LESS_THAN_BLOCKS = (63, 65, 63)
ONE_PAST_A_BLOCK = (33, 33, 33)
WIDE = (65, 70, 130)
# Blocks end with the features out but not with those in; backward the other way round.
FEW_ROWS = (7, 130, 64)
EVEN = (64, 32, 64)
ALL = [ONE, ONE_LESS_THAN_BLOCKS, ONE_PAST_A_BLOCK, WIDE, FEW_ROWS, EVEN]
# What is not about blocks.
SMALL = (33, 17, 34)
# Of the axes of each operand, so that all of them have different strides.
GAPS = {
    "x": (1, 0, 1),
    "weight": (0, 1, 2),
    "residual": (1, 0, 3),
    "grad": (1, 0, 4),
    "grad_hidden": (1, 0, 5),
}


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Run the Triton kernels, whatever is pinned as the faster one."""
    monkeypatch.setattr(implementation, "_runs_triton", lambda _, x, *more: implementation.use_triton(x))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names = []

    def launch(kernel, *arguments, **options):
        names.append(kernel.__name__)
        implementation_launch(kernel, *arguments, **options)

    implementation_launch = implementation.triton_code.launch
    monkeypatch.setattr(implementation.triton_code, "launch", launch)
    return names


def tensors(sizes, dtype, device):
    rows, fan_in, fan_out = sizes
    shapes = {
        "x": (rows, 2, fan_in),
        "weight": (2, fan_out, fan_in),
        "bias": (2, fan_out),
        "offset": (fan_out,),
        "slope": (fan_out,),
        "residual": (rows, 2, fan_out),
        "grad": (rows, 2, fan_out),
        "grad_hidden": (rows, 2, fan_out),
    }
    made = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    return made | {name: padded(made[name], *gaps) for name, gaps in GAPS.items()}


def run(function, inputs, cotangents):
    """Outputs and all gradients."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def activated(activation):
    """The function and the plain one."""
    return [partial(f, activation=activation) for f in (complex_linear_activated, linear_activated)]


def check(function, plain, inputs, cotangents):
    results = run(function, inputs, cotangents)
    exact = run(plain, {name: value.double() for name, value in inputs.items()}, cotangents)
    assert_as_accurate(results, lambda: run(plain, inputs, cotangents), exact)
    return results


def alternating(first, second):
    """Every size, in one dtype or the other."""
    return in_each_half([(sizes, (first, second)[k % 2]) for k, sizes in enumerate(ALL)])


@pytest.mark.parametrize(("sizes", "dtype"), alternating(torch.float16, torch.float32))
def test_product(sizes, dtype, device, launched):
    t = tensors(sizes, dtype, device)
    used = {name: t[name] for name in ("x", "weight", "bias")}
    check(complex_linear, linear, used, [t["grad"]])
    assert launched == ["_product_kernel", "_product_kernel", "_weight_gradient_kernel"]


@pytest.mark.parametrize(("sizes", "dtype"), alternating(torch.float32, torch.float16))
def test_three_products(sizes, dtype, device):
    t = tensors(sizes, dtype, device)
    used = {name: t[name] for name in ("x", "weight", "residual")}
    functions = [partial(function, products=3) for function in (complex_linear, linear)]
    check(*functions, used, [t["grad"]])


@pytest.mark.parametrize("dtype", HALVES)
def test_error_of_three_products(dtype, device):
    t = tensors((128, 64, 128), dtype, device)
    exact = linear(t["x"].double(), t["weight"].double())

    def error(products):
        y = complex_linear(t["x"], t["weight"], products=products).double()
        error = (y - exact).square().mean() / exact.square().mean()
        return error.sqrt().item() * torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps

    # As the docstring says of bfloat16; the roundings of float16 are smaller by a power of two.
    assert 1.5e-3 < error(4) < 1.9e-3
    assert 2.7e-3 < error(3) < 3.3e-3


@pytest.mark.parametrize(
    ("activation", "sizes", "dtype"),
    in_each_half(
        [
            ("mod_relu", ONE_LESS_THAN_BLOCKS, torch.float32),
            ("mod_relu", WIDE, torch.float16),
            ("mod_swish", FEW_ROWS, torch.float16),
            ("mod_swish", EVEN, torch.float32),
            ("split_gelu", ONE_PAST_A_BLOCK, torch.float16),
            ("split_gelu", ONE, torch.float32),
        ]
    ),
)
def test_activated(activation, sizes, dtype, device, launched):
    t = tensors(sizes, dtype, device)
    used = {name: t[name] for name in ("x", "weight", "bias", "residual", *PARAMETERS[activation])}

    check(*activated(activation), used, [t["grad"], t["grad_hidden"]])
    assert launched.count("_product_kernel") == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(PARAMETERS))
def test_epilogue_is_the_activation_bit_for_bit(dtype, activation, device):
    """So that a backward pass that activates the hidden state again gets what the forward pass had."""
    t = tensors(SMALL, dtype, device)
    parameters = {name: t[name] for name in PARAMETERS[activation]}
    active, hidden = complex_linear_activated(t["x"], t["weight"], activation=activation, **parameters)
    assert torch.equal(active, complex_activation(hidden, activation, **parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mod_relu_without_offset_is_the_identity(dtype, device):
    t = tensors(SMALL, dtype, device)
    offset = torch.zeros(34, device=device)
    active, hidden = complex_linear_activated(t["x"], t["weight"], activation="mod_relu", offset=offset)
    assert torch.equal(active, hidden)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [("mod_relu", True), ("mod_swish", False), ("split_gelu", True)]
)
def test_one_gradient_and_no_bias(activation, with_residual, kept, device):
    t = tensors(SMALL, torch.float32, device)
    names = ("x", "weight", *PARAMETERS[activation], *(["residual"] if with_residual else []))
    used = {name: t[name] for name in (names if kept == 0 else names[:2])}
    others = {name: t[name] for name in names if name not in used}

    def partly(function):
        def run(x, **inputs):
            same = {name: value.to(x.dtype) for name, value in others.items()}
            return function(x=x, **inputs, **same)[kept]

        return run

    function, plain = map(partly, activated(activation))
    check(function, plain, used, [t["grad"]])


@pytest.mark.parametrize(
    ("activation", "dtype"), in_each_half([("mod_relu", torch.float16), ("mod_swish", torch.float32)])
)
def test_many_rows_are_split(activation, dtype, device, monkeypatch):
    block = PINNED.options("weight_gradient", torch.empty(0, device=device, dtype=dtype), 33)["BLOCK_M"]
    # An odd number of blocks, so that the last group of them is not full.
    t = tensors((4 * block + 1, 17, 33), dtype, device)
    used = {name: t[name] for name in ("x", "weight", "bias", "residual", *PARAMETERS[activation])}
    # Few programs, so that each has several blocks of rows.
    monkeypatch.setattr(implementation.triton_code, "PROGRAMS", 4)
    splits = []

    def launch(kernel, grid, *arguments, **options):
        if kernel.__name__ != "_product_kernel":
            splits.append(grid[1])
        implementation_launch(kernel, grid, *arguments, **options)

    implementation_launch = implementation.triton_code.launch
    monkeypatch.setattr(implementation.triton_code, "launch", launch)

    function, plain = activated(activation)
    cotangents = [t["grad"], t["grad_hidden"]]
    results = check(function, plain, used, cotangents)
    (split,) = splits
    assert 1 < split <= 16
    again = run(function, used, cotangents)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    in_each_half([("mod_relu", torch.float16), ("mod_swish", torch.float32), ("split_gelu", torch.float16)]),
)
def test_large_values(activation, dtype, device):
    t = tensors(SMALL, dtype, device)
    t["x"] *= 100
    used = {name: t[name] for name in ("x", "weight", *PARAMETERS[activation])}
    # A sum of larger gradients may leave the range of float16.
    check(*activated(activation), used, [t["grad"] / 16, t["grad_hidden"] / 16])


@pytest.mark.parametrize(
    ("activation", "dtype"),
    in_each_half(
        [
            ("mod_relu", torch.float32),
            ("mod_relu", torch.float16),
            ("mod_swish", torch.float16),
            ("split_gelu", torch.float32),
        ]
    ),
)
def test_zeros(activation, dtype, device):
    t = tensors(SMALL, dtype, device)
    t["x"].zero_()
    t["offset"].abs_()
    used = {name: t[name] for name in ("x", "weight", *PARAMETERS[activation])}
    function, plain = activated(activation)
    # The gradient of mod_relu is of order offset / floor here, and the floor depends on the dtype.
    plain = partial(plain, floor=modulus_floor(dtype))
    check(function, plain, used, [t["grad"], t["grad_hidden"]])


@pytest.mark.parametrize("dtype", HALVES)
def test_wide_residual(dtype, device):
    t = tensors(SMALL, dtype, device)
    t["residual"] = padded(torch.randn(33, 2, 34, device=device), *GAPS["residual"])
    used = {name: t[name] for name in ("x", "weight", "residual")}

    def function(**inputs):
        y = complex_linear(**inputs)
        active, hidden = complex_linear_activated(**inputs, activation="split_gelu")
        assert y.dtype == active.dtype == torch.float32
        return y, active, hidden

    def plain_function(**inputs):
        return linear(**inputs), *linear_activated(**inputs, activation="split_gelu")

    cotangents = [torch.randn(33, 2, 34, device=device), torch.randn(33, 2, 34, device=device), t["grad"]]
    results = check(function, plain_function, used, cotangents)
    exact = linear(**{name: value.double() for name, value in used.items()})
    # The sum with the residual is rounded once, in float32.
    assert (results[0] - exact).abs().max() < 1e-4


@pytest.mark.parametrize("products", [3, 4])
@pytest.mark.parametrize("lead", [(), (3, 2), (0,)])
def test_strides_and_leading_shapes(products, lead, device):
    rows = torch.Size(lead).numel()
    t = tensors((rows, 6, 5), torch.float32, device)
    used = {
        "x": t["x"].mT.contiguous().mT.reshape(*lead, 2, 6),
        "weight": t["weight"].mT.contiguous().mT,
        "bias": t["bias"].t().contiguous().t(),
        "residual": t["residual"].transpose(0, -1).contiguous().transpose(0, -1).reshape(*lead, 2, 5),
    }
    cotangent = t["grad"].mT.contiguous().mT.reshape(*lead, 2, 5)

    def function(**inputs):
        return complex_linear(**inputs, products=products)

    results = run(function, used, [cotangent])
    with eager():
        expected = run(function, used, [cotangent])
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", list(PARAMETERS))
def test_strided_operands_of_an_activated_product(activation, device):
    t = tensors((7, 6, 5), torch.float32, device)
    names = ("x", "weight", "bias", "residual", *PARAMETERS[activation])

    def strided(z):
        """The same values between others."""
        return torch.stack((z, z + 1), -1)[..., 0]

    def function(**inputs):
        return complex_linear_activated(**inputs, activation=activation)

    used = {name: t[name] for name in names}
    expected = run(function, used, [t["grad"], t["grad_hidden"]])
    results = run(
        lambda **inputs: function(**{name: strided(value) for name, value in inputs.items()}),
        used,
        [strided(t["grad"]), t["grad_hidden"].transpose(0, 1).contiguous().transpose(0, 1)],
    )
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def test_no_rows(device):
    t = tensors((0, 6, 5), torch.float32, device)
    used = {name: t[name] for name in ("x", "weight", "bias", "offset", "slope", "residual")}
    results = run(
        lambda **inputs: complex_linear_activated(**inputs, activation="mod_swish"), used, [t["grad"]] * 2
    )
    assert all((result == 0).all() for result in results)


def test_second_derivatives_run_the_kernels_too(device, launched):
    t = tensors((3, 6, 5), torch.float32, device)
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()

    def second():
        grads = torch.autograd.grad(complex_linear(x, weight), (x, weight), t["grad"], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight))

    results = second()
    # Two products and a weight's gradient, then the gradients of the latter two.
    assert launched.count("_product_kernel") >= 3
    assert launched.count("_weight_gradient_kernel") >= 2
    with eager():
        for result, expected in zip(results, second(), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_dispatch_follows_the_table(device, monkeypatch):
    monkeypatch.undo()
    x = torch.randn(4, 2, 32, device=device)
    weight_shape = (2, 32, 32)
    table = PINNED.table["dispatch"]
    for target in table:
        monkeypatch.setattr(implementation, "target_name", lambda _, target=target: target)
        for operation, backend in table[target]["32"].items():
            runs = implementation._runs_triton(operation, x, weight_shape, None)
            assert runs == (backend == "triton")
    with eager():
        assert not implementation._runs_triton("product", x, weight_shape, None)
    # Rows of such features are not aligned: compiled kernels leave them to the library.
    monkeypatch.setattr(implementation, "INTERPRETED", False)
    monkeypatch.setattr(implementation, "target_name", lambda _: "interpreter")
    assert implementation._runs_triton("product", x, (2, 32, 32), None)
    assert not implementation._runs_triton("product", x, (2, 33, 32), None)
    assert not implementation._runs_triton("product", x, (2, 32, 31), None)
