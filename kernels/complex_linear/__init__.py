"""The planar complex product y = x W^T + b, its gradients, and the product with an activation behind it.

``complex_linear`` and ``complex_linear_activated`` are what callers use. A product of ``rows`` tokens takes
8 rows in out FLOPs (four real products), 6 with Gauss's three products.

The eager implementation is one real product: [x_r | x_i] with the real form [[W_r, -W_i], [W_i, W_r]] of the
weight, which is built again in the backward pass and never kept. On a GPU that is a product of cuBLAS or
hipBLASLt; whether it or the Triton kernel runs is pinned in the JSON under "dispatch", by architecture and
bits of the dtype. The library makes float32, where the Triton kernels are bound by the multiply-adds of
input_precision="ieee", and numbers of features that are no multiple of 16, where rows are not aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.complex_activation import complex_activation, complex_activation_backward
from kernels.complex_linear import eager, triton_code
from kernels.complex_linear.triton_code import PINNED
from kernels.launch import fastest, target_name, tuning, use_triton
from kernels.operator import operator
from kernels.triton_import import INTERPRETED

__all__ = ["complex_linear", "complex_linear_activated"]

# Features whose multiples the compiler knows to be aligned for wide loads.
ALIGNED = 16
# The learned parameters of each activation.
PARAMETERS = {"mod_relu": ("offset",), "mod_swish": ("offset", "slope"), "split_gelu": ()}


def complex_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    products: int = 4,
    residual: Tensor | None = None,
) -> Tensor:
    """y_r = x_r W_r^T - x_i W_i^T + b_r, y_i = x_r W_i^T + x_i W_r^T + b_i (+ residual).

    Args:
        x: planar (..., 2, in).
        weight: (2, out, in), of the same dtype.
        bias: (2, out).
        products: 4, or 3 for Gauss's P1 = x_r W_r^T, P2 = x_i W_i^T, P3 = (x_r + x_i)(W_r + W_i)^T with
            y_r = P1 - P2, y_i = P3 - P1 - P2: a quarter less arithmetic, but the sums x_r + x_i and W_r + W_i
            are rounded and the differences cancel. In bfloat16 the root mean square error is 3.0e-3 of the
            result by the Triton kernel and 3.9e-3 by the eager implementation, which rounds each product too,
            against 1.7e-3 with four products. The gradient at x is made by as many products, that at the
            weight always by four.
        residual: planar (..., 2, out), added to the result.

    Returns:
        Planar (..., 2, out), in autocast's dtype where autocast is on, promoted with that of the residual.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a number of products that is neither 3 nor 4.
    """
    x, weight, bias = _cast(x, weight, bias)
    _check(x, weight, bias, residual)
    if products not in (3, 4):
        raise ValueError(f"products must be 3 or 4, not {products}")
    return _complex_product(x, weight, bias, residual, products, False)


def complex_linear_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden = complex_linear(x, weight, bias), active = activation(hidden) (+ residual).

    By one kernel where the Triton product runs, else one after the other.

    The backward pass keeps hidden and not active.

    Args:
        x: planar (..., 2, in).
        weight: (2, out, in), of the same dtype.
        bias: (2, out).
        activation: ``mod_relu`` ReLU(|z| + offset) z / |z|, ``mod_swish`` z sigmoid(slope |z| + offset),
            or ``split_gelu``, GELU on each plane. |z| has a floor (``kernels.planar``), so that
            gradients at 0 are finite.
        offset: (out,), of mod_relu and mod_swish.
        slope: (out,), of mod_swish.
        residual: planar (..., 2, out), added behind the activation.

    Returns:
        active, hidden: planar (..., 2, out), hidden in the dtype of x (or autocast's), active in that
        promoted with the residual's.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown activation, parameters missing or too many.
    """
    x, weight, bias = _cast(x, weight, bias)
    _check(x, weight, bias, residual)
    if activation not in PARAMETERS:
        raise ValueError(f"unknown activation {activation}; there are {', '.join(PARAMETERS)}")
    for name, parameter in (("offset", offset), ("slope", slope)):
        if (name in PARAMETERS[activation]) != (parameter is not None):
            raise ValueError(f"{activation} takes {' and '.join(PARAMETERS[activation]) or 'no parameter'}")
        if parameter is not None and parameter.shape != weight.shape[1:2]:
            raise ValueError(f"{name} {tuple(parameter.shape)} must be ({weight.shape[1]},)")

    def run(by_triton: bool) -> tuple[Tensor, Tensor]:
        if by_triton:
            return _complex_product_activated(x, weight, bias, offset, slope, residual, activation)
        hidden = _complex_product(x, weight, bias, None, 4, False)
        active = complex_activation(hidden, activation, offset, slope)
        return active if residual is None else active + residual, hidden

    return run(_runs_triton("epilogue", x, tuple(weight.shape), run))


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """To autocast's dtype; the bias always to that of the product."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return x, weight, None if bias is None else bias.to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if weight.dim() != 3 or weight.shape[0] != 2:
        raise ValueError(f"weight {tuple(weight.shape)} must be (2, out, in)")
    _, out_features, in_features = weight.shape
    if x.dim() < 2 or x.shape[-2:] != (2, in_features):
        raise ValueError(f"x {tuple(x.shape)} must be (..., 2, {in_features})")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}")
    if bias is not None and bias.shape != (2, out_features):
        raise ValueError(f"bias {tuple(bias.shape)} must be (2, {out_features})")
    if residual is not None and residual.shape != (*x.shape[:-1], out_features):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(*x.shape[:-1], out_features)}")


def _runs_triton(
    operation: str, x: Tensor, weight_shape: tuple[int, ...], run: Callable[[bool], object]
) -> bool:
    """Whether the Triton kernel runs for an operation, else the library's product.

    With MUSE_TUNE_KERNELS=1 on a GPU the faster one of ``run(True)``, Triton, and ``run(False)``, measured
    once and kept for the rest of the process.
    """
    if not use_triton(x):
        return False
    if not INTERPRETED and any(features % ALIGNED for features in weight_shape[1:]):
        return False
    if tuning(x):
        run(True)  # Chooses the launch options, which is not to be measured.
        key = (f"complex_linear {operation}", x.dtype, x.shape[:-2].numel(), *weight_shape)
        return fastest(key, {"library": partial(run, False), "triton": partial(run, True)}) == "triton"
    dispatch: Any = PINNED.table["dispatch"]
    return bool(dispatch[target_name(x)][str(8 * x.element_size())][operation] == "triton")


@operator
def _complex_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    def run(by_triton: bool) -> Tensor:
        code = triton_code if by_triton else eager
        return code.product(x, weight, bias, residual, products, adjoint)

    operation = "three_products" if products == 3 else "product"
    return run(_runs_triton(operation, x, tuple(weight.shape), run))


@operator
def _complex_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    def run(by_triton: bool) -> Tensor:
        code = triton_code if by_triton else eager
        return code.weight_gradient(grad, x)

    return run(_runs_triton("weight_gradient", x, (2, grad.shape[-1], x.shape[-1]), run))


@operator
def _complex_product_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    code = triton_code if use_triton(x) else eager
    return code.product_activated(x, weight, bias, offset, slope, residual, activation)


@_complex_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, products: int, adjoint: bool) -> Tensor:
    return eager.empty_product(x, weight, residual, adjoint)


@_complex_product_activated.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, offset: Any, slope: Any, residual: Tensor | None, _: str) -> Any:
    return eager.empty_product(x, weight, residual), eager.empty_product(x, weight)


_complex_weight_gradient.register_fake(lambda grad, x: x.new_empty(2, grad.shape[-1], x.shape[-1]))


# The product, the product with the conjugate weight and the weight's gradient are each other's
# gradients, so complex_linear has gradients of any order.


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, residual, ctx.products, ctx.adjoint = inputs
    _keep_factors(ctx, x, weight, residual)


def _keep_factors(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, *more: Any) -> None:
    """Those whose gradients ask for them."""
    for_weight, for_x = x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(for_weight, for_x, *more)
    ctx.dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _differentiate_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
    gradients = _gradients(ctx.needs_input_grad, grad.to(ctx.dtype), x, weight, ctx.products, ctx.adjoint)
    return (*gradients, grad_residual, None, None)


def _gradients(
    needed: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, products: int, adjoint: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias."""
    grad_x = grad_weight = grad_bias = None
    if needed[0]:
        grad_x = _complex_product(grad, weight, None, None, products, not adjoint)
    if needed[1]:
        grad_weight = _complex_weight_gradient(x, grad) if adjoint else _complex_weight_gradient(grad, x)
    if needed[2]:
        grad_bias = grad.reshape(grad.shape[:-2].numel(), *grad.shape[-2:]).sum(0)
    return grad_x, grad_weight, grad_bias


def _keep_weight_gradient(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_weight_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, x = ctx.saved_tensors
    return (
        _complex_product(x, grad, None, None, 4, False) if ctx.needs_input_grad[0] else None,
        _complex_product(rows, grad, None, None, 4, True) if ctx.needs_input_grad[1] else None,
    )


def _keep_activated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, slope, residual, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    _keep_factors(ctx, x, weight, residual, output[1], offset, slope)


def _differentiate_activated(
    ctx: Any, grad_active: Tensor | None, grad_hidden: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, hidden, *parameters = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grad, grad_parameters, grad_residual = grad_hidden, [None, None], None
    if grad_active is not None:
        if needed[5]:
            grad_residual = grad_active.to(ctx.residual_dtype)
        if any(needed[:5]):
            grad_active = grad_active.to(hidden.dtype)
            grad, sums = complex_activation_backward(grad_active, hidden, ctx.activation, *parameters)
            grad_parameters = [sums[k].to(parameters[k].dtype) if needed[3 + k] else None for k in range(2)]
            grad = grad if grad_hidden is None else grad + grad_hidden
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        gradients = _gradients(needed, grad.to(ctx.dtype), x, weight, 4, False)
    return (*gradients, *grad_parameters, grad_residual, None)


_complex_product.register_autograd(_differentiate_product, setup_context=_keep_product)
_complex_weight_gradient.register_autograd(
    _differentiate_weight_gradient, setup_context=_keep_weight_gradient
)
_complex_product_activated.register_autograd(_differentiate_activated, setup_context=_keep_activated)
