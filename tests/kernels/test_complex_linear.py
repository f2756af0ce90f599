from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.rounding import assert_as_accurate

from kernels.complex_activation.plain import activation as activate
from kernels.complex_linear import (
    PARAMETERS,
    PINNED,
    _complex_product,
    _complex_product_activated,
    _complex_weight_gradient,
    complex_linear,
    complex_linear_activated,
)
from kernels.complex_linear.plain import linear, linear_activated
from kernels.complex_linear.triton_code import compile_cases
from kernels.launch import INTERPRETER, TARGETS
from muse.planar import multiply

ROWS, FAN_IN, FAN_OUT = 3, 4, 5
ACTIVATIONS = list(PARAMETERS)


def tensors(dtype=torch.float64, rows=ROWS, fan_in=FAN_IN, fan_out=FAN_OUT, requires_grad=True):
    shapes = {
        "x": (rows, 2, fan_in),
        "weight": (2, fan_out, fan_in),
        "bias": (2, fan_out),
        "offset": (fan_out,),
        "slope": (fan_out,),
        "residual": (rows, 2, fan_out),
    }
    return {name: torch.randn(s).to(dtype).requires_grad_(requires_grad) for name, s in shapes.items()}


def chosen(tensors, activation, *more):
    names = ("x", "weight", "bias", *PARAMETERS[activation], *more)
    return {name: tensors[name] for name in names}


def gradients(outputs, inputs, cotangents):
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    return torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [c for _, c in pairs])


@pytest.mark.parametrize("products", [3, 4])
@pytest.mark.parametrize("extra", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_product_is_the_complex_product(products, extra):
    t = tensors()
    used = {name: t[name] for name in ("x", "weight", *extra)}
    y = complex_linear(**used, products=products)
    expected = linear(t["x"], t["weight"], used.get("bias")) + used.get("residual", 0)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    got = gradients([y], used, [cotangent])
    for actual, wanted in zip(got, gradients([expected], used, [cotangent]), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("products", [3, 4])
def test_a_phase_of_the_input_is_one_of_the_product(products):
    t = tensors(requires_grad=False)
    phase = torch.tensor([[math.cos(0.7)], [math.sin(0.7)]], dtype=torch.float64)
    turned = complex_linear(multiply(t["x"], phase), t["weight"], products=products)
    torch.testing.assert_close(
        turned, multiply(complex_linear(t["x"], t["weight"], products=products), phase)
    )


@pytest.mark.parametrize("products", [3, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_repeated_gradients_are_the_same_bits(products, activation):
    t = tensors(torch.float32, 65, 33, 17)
    leaves = [t[name] for name in ("x", "weight", "bias")]
    active, _ = complex_linear_activated(**chosen(t, activation), activation=activation)
    total = active.sum() + complex_linear(*leaves, products=products).square().sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("products", [3, 4])
def test_gradients_of_the_product_to_second_order(products):
    t = tensors()
    inputs = [t[name] for name in ("x", "weight", "bias", "residual")]

    def function(x, weight, bias, residual):
        return complex_linear(x, weight, bias, products=products, residual=residual)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_activated_value(activation, with_residual):
    t = tensors(requires_grad=False)
    used = chosen(t, activation, *(["residual"] if with_residual else []))
    active, hidden = complex_linear_activated(**used, activation=activation)
    torch.testing.assert_close(hidden, linear(t["x"], t["weight"], t["bias"]))
    parameters = [t[name] for name in PARAMETERS[activation]]
    expected = activate(hidden, activation, *parameters) + used.get("residual", 0)
    torch.testing.assert_close(active, expected)
    assert active.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_activated_gradients(activation, outputs):
    t = tensors()
    used = chosen(t, activation, "residual")

    def function(*inputs):
        out = complex_linear_activated(**dict(zip(used, inputs, strict=True)), activation=activation)
        return tuple(out[i] for i in outputs)

    assert torch.autograd.gradcheck(function, list(used.values()))


def test_second_derivative_of_an_activation_is_refused():
    t = tensors()
    active, _ = complex_linear_activated(**chosen(t, "mod_swish"), activation="mod_swish")
    (grad,) = torch.autograd.grad(active.sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="complex_activation_backward"):
        grad.sum().backward()


def test_mod_relu_without_offset_is_the_identity():
    t = tensors(torch.float32, 65, 33, 17, requires_grad=False)
    active, hidden = complex_linear_activated(
        t["x"], t["weight"], activation="mod_relu", offset=torch.zeros(17)
    )
    assert torch.equal(active, hidden)


@pytest.mark.parametrize("activation", ["mod_relu", "mod_swish", "split_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_at_zero_are_finite(activation, dtype):
    t = tensors(dtype)
    with torch.no_grad():
        t["x"].zero_()
        t["offset"].abs_()
    used = chosen(t, activation) | {"bias": None}
    active, _ = complex_linear_activated(**used, activation=activation)
    active.sum().backward()
    assert (active == 0).all()
    for tensor in used.values():
        assert tensor is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_leading_shape(lead, activation):
    t = tensors(rows=6)
    used = chosen(t, activation, "residual")
    rows = torch.Size(lead).numel()
    used |= {name: used[name][:rows].reshape(*lead, *used[name].shape[1:]) for name in ("x", "residual")}
    active, hidden = complex_linear_activated(**used, activation=activation)
    assert active.shape == hidden.shape == (*lead, 2, FAN_OUT)
    one_by_one = [
        complex_linear_activated(
            **used
            | {"x": used["x"].reshape(-1, 2, FAN_IN)[i], "residual": used["residual"].flatten(0, -3)[i]}
            if lead
            else used,
            activation=activation,
        )
        for i in range(rows)
    ]
    for (one_active, one_hidden), a, h in zip(
        one_by_one, active.reshape(-1, 2, FAN_OUT), hidden.reshape(-1, 2, FAN_OUT), strict=True
    ):
        torch.testing.assert_close(one_active, a)
        torch.testing.assert_close(one_hidden, h)
    for gradient in gradients([active, hidden], used, [active.detach(), hidden.detach()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operands_need_not_be_contiguous(activation):
    t = tensors()
    used = chosen(t, activation, "residual")
    strided = {
        name: value.detach().mT.contiguous().mT.requires_grad_() if value.dim() > 1 else value
        for name, value in used.items()
    }
    assert not strided["x"].is_contiguous()
    cotangent = torch.randn(FAN_OUT, 2, ROWS, dtype=torch.float64).permute(2, 1, 0)
    results = []
    for inputs in (used, strided):
        outputs = complex_linear_activated(**inputs, activation=activation)
        results.append([*outputs, *gradients(outputs, inputs, [cotangent, cotangent])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


SIZES = [(1, 1, 1), (33, 35, 17), (5, 1, 63)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Every two of these choices meet.
@pytest.mark.parametrize(
    ("activation", "dtype", "sizes"),
    [
        (activation, DTYPES[k], SIZES[(n + k) % 3])
        for n, activation in enumerate(ACTIVATIONS)
        for k in range(3)
    ],
)
def test_accuracy(activation, dtype, sizes):
    t = tensors(dtype, *sizes)
    used = chosen(t, activation, "residual")
    cotangents = [torch.randn(sizes[0], 2, sizes[2]).to(dtype) for _ in range(2)]

    plain = partial(linear_activated, activation=activation)

    def run(function, inputs):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        outputs = function(**leaves)
        return [*outputs, *gradients(outputs, leaves, [c.to(outputs[0].dtype) for c in cotangents])]

    results = run(lambda **inputs: complex_linear_activated(**inputs, activation=activation), used)
    exact = run(plain, {name: value.double() for name, value in used.items()})
    assert_as_accurate(results, lambda: run(plain, used), exact)


def test_error_of_three_products():
    t = tensors(torch.bfloat16, 512, 256, 256, requires_grad=False)
    exact = linear(t["x"].double(), t["weight"].double())

    def error(products):
        y = complex_linear(t["x"], t["weight"], products=products).double()
        return ((y - exact).square().mean() / exact.square().mean()).sqrt().item()

    # As the docstring says.
    assert 1.5e-3 < error(4) < 1.9e-3
    assert 3.5e-3 < error(3) < 4.3e-3


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(activation, dtype, backward_inside):
    t = tensors(torch.float32)

    def run(inputs):
        if activation is None:
            return complex_linear(**inputs)
        return complex_linear_activated(**inputs, activation=activation)[0]

    names = PARAMETERS[activation] if activation else ()
    used = {name: t[name] for name in ("x", "weight", "bias", "residual", *names)}
    by_hand = used | {name: used[name].to(dtype) for name in ("x", "weight", "bias")}
    expected = torch.autograd.grad(run(by_hand).square().sum(), list(used.values()))
    with torch.autocast("cpu", dtype):
        y = run(used)
        # The residual stream stays in float32.
        assert y.dtype == torch.float32
        if backward_inside:
            got = torch.autograd.grad(y.square().sum(), list(used.values()))
    if not backward_inside:
        got = torch.autograd.grad(y.square().sum(), list(used.values()))
    assert torch.equal(y, run(by_hand))
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_residual_is_not_rounded(dtype):
    t = tensors(dtype, requires_grad=False)
    residual = torch.randn(ROWS, 2, FAN_OUT, requires_grad=True)
    y = complex_linear(t["x"], t["weight"], residual=residual)
    active, hidden = complex_linear_activated(t["x"], t["weight"], activation="split_gelu", residual=residual)
    assert y.dtype == active.dtype == torch.float32
    assert hidden.dtype == dtype
    assert torch.equal(y, complex_linear(t["x"], t["weight"]) + residual)
    cotangent = torch.randn_like(residual)
    for output in (y, active):
        assert torch.equal(torch.autograd.grad(output, residual, cotangent)[0], cotangent)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "offset", "slope", "residual"])
@pytest.mark.parametrize("kept", ["active", "hidden"])
def test_only_wanted_gradients(wanted, kept):
    t = tensors(requires_grad=False)
    t[wanted].requires_grad_()
    active, hidden = complex_linear_activated(**chosen(t, "mod_swish", "residual"), activation="mod_swish")
    output = active if kept == "active" else hidden
    dependent = kept == "active" or wanted in ("x", "weight", "bias")
    if not output.requires_grad:
        assert not dependent
        return
    (got,) = torch.autograd.grad(output.sum(), t[wanted], allow_unused=True)
    assert (got is not None and bool((got != 0).any())) == dependent


def test_what_is_kept_for_the_backward_pass():
    t = tensors()

    def kept(run):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: seen.append(tensor), lambda nothing: None
        ):
            outputs = run()
        return seen, outputs

    seen, (active, hidden) = kept(
        lambda: complex_linear_activated(**chosen(t, "mod_swish", "residual"), activation="mod_swish")
    )
    expected = [t["x"], t["weight"], hidden, t["offset"], t["slope"]]
    assert {tensor.data_ptr() for tensor in seen} == {tensor.data_ptr() for tensor in expected}
    assert active.data_ptr() not in [tensor.data_ptr() for tensor in seen]
    seen, _ = kept(lambda: complex_linear(t["x"], t["weight"].detach(), t["bias"], residual=t["residual"]))
    assert [tensor.data_ptr() for tensor in seen] == [t["weight"].data_ptr()]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("products", [3, 4])
def test_product_is_registered_properly(adjoint, products):
    t = tensors(torch.float32)
    bias, residual = (None, None) if adjoint else (t["bias"], t["residual"])
    x = t["residual"] if adjoint else t["x"]
    torch.library.opcheck(_complex_product, (x, t["weight"], bias, residual, products, adjoint))


def test_weight_gradient_is_registered_properly():
    t = tensors(torch.float32)
    torch.library.opcheck(_complex_weight_gradient, (t["residual"], t["x"]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activated_product_is_registered_properly(activation):
    t = tensors(torch.float32)
    offset, slope = (t[name] if name in PARAMETERS[activation] else None for name in ("offset", "slope"))
    arguments = (t["x"], t["weight"], t["bias"], offset, slope, t["residual"], activation)
    torch.library.opcheck(_complex_product_activated, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("products", [3, 4])
def test_compiles_to_one_graph(products):
    t = tensors(torch.float32)

    def function(x, weight, bias, offset, slope, residual):
        active, _ = complex_linear_activated(
            x, weight, bias, activation="mod_swish", offset=offset, slope=slope, residual=residual
        )
        return complex_linear(active, weight.mT, products=products)

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        y = run(*t.values())
        results.append([y, *torch.autograd.grad(y.square().sum(), list(t.values()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_bad_input_is_refused():
    t = tensors(torch.float32)
    x, weight = t["x"], t["weight"]
    with pytest.raises(ValueError, match=r"weight .* must be \(2, out, in\)"):
        complex_linear(x, weight[0])
    with pytest.raises(ValueError, match=r"x .* must be \(\.\.\., 2, 4\)"):
        complex_linear(x[..., :3], weight)
    with pytest.raises(ValueError, match=r"x .* must be \(\.\.\., 2, 4\)"):
        complex_linear(x[:, :1], weight)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and weight torch\.float32"):
        complex_linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"bias .* must be \(2, 5\)"):
        complex_linear(x, weight, t["offset"])
    with pytest.raises(ValueError, match=r"residual .* must be \(3, 2, 5\)"):
        complex_linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="products must be 3 or 4, not 5"):
        complex_linear(x, weight, products=5)
    with pytest.raises(ValueError, match="unknown activation relu; there are mod_relu, "):
        complex_linear_activated(x, weight, activation="relu")
    with pytest.raises(ValueError, match="mod_swish takes offset and slope"):
        complex_linear_activated(x, weight, activation="mod_swish", offset=t["offset"])
    with pytest.raises(ValueError, match="split_gelu takes no parameter"):
        complex_linear_activated(x, weight, activation="split_gelu", slope=t["slope"])
    with pytest.raises(ValueError, match=r"offset \(4,\) must be \(5,\)"):
        complex_linear_activated(x, weight, activation="mod_relu", offset=torch.zeros(4))


def test_every_kernel_is_pinned_for_every_target():
    names = {INTERPRETER, *(target.name for target in TARGETS)}
    assert all(table.keys() == names for table in PINNED.table.values())
    for bits in PINNED.table["dispatch"].values():
        for operations in bits.values():
            assert operations.keys() == {"product", "three_products", "weight_gradient", "epilogue"}
            assert set(operations.values()) <= {"triton", "library"}


def test_number_of_compile_cases_is_bearable():
    assert len(compile_cases()) <= 40
