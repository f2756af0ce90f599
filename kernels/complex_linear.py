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
import torch.nn.functional as F
from torch import Tensor

from kernels.complex_pointwise import (
    activated,
    activation_eager,
    activation_floor,
    complex_activation,
    complex_activation_backward,
)
from kernels.launch import Options, ceil_div, fastest, launch, pinned_beside, target_name, tuning, use_triton
from kernels.operator import operator
from kernels.planar import upcast
from kernels.triton_import import INTERPRETED, jit, tl

PINNED = pinned_beside(__file__)
# Pinned for narrow products and for all others.
WIDEST = 128
# Programs that fill a large GPU: where a grid has fewer, the rows are split among more.
PROGRAMS = 256
# Features whose multiples the compiler knows to be aligned for wide loads.
ALIGNED = 16
# The learned parameters of each activation.
PARAMETERS = {"mod_relu": ("offset",), "mod_swish": ("offset", "slope"), "split_gelu": ()}


# ---------------------------------------------------------------------------------------------------------
# Eager


def real_form(weight: Tensor) -> Tensor:
    """[[W_r, -W_i], [W_i, W_r]], (2 out, 2 in): acts on [re | im] as the weight (2, out, in) acts on z."""
    real, imag = weight
    out_features, in_features = real.shape
    form = weight.new_empty(2, out_features, 2, in_features)
    form[0, :, 0] = real
    form[1, :, 1] = real
    form[1, :, 0] = imag
    torch.neg(imag, out=form[0, :, 1])
    return form.view(2 * out_features, 2 * in_features)


def _flat(z: Tensor) -> Tensor:
    """(..., 2, D) as [re | im], (rows, 2 D)."""
    return z.reshape(z.shape[:-2].numel(), 2 * z.shape[-1])


def _product_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[2 if adjoint else 1])
    if products == 3:
        y = _three_products(x, weight.mT if adjoint else weight, adjoint)
        y = y if bias is None else y.add_(bias)
    elif adjoint:
        y = _flat(x) @ real_form(weight)
    else:
        y = F.linear(_flat(x), real_form(weight), None if bias is None else bias.reshape(-1))
    return _plus(y.view(shape), residual)


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """The sum, in the memory of y if it has the dtype."""
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def _three_products(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """Gauss's product (rows, 2, out); half precision is summed in float32 between the products."""
    re, im = x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).unbind(-2)
    w_re, w_im = weight
    w_sum = w_re - w_im if conjugate else w_re + w_im
    first, second, third = upcast(re @ w_re.t()), upcast(im @ w_im.t()), upcast((re + im) @ w_sum.t())
    if conjugate:
        second = -second
    y = x.new_empty(re.shape[0], 2, w_re.shape[0])
    y[:, 0] = first - second
    y[:, 1] = third.sub_(first).sub_(second)
    return y


def _weight_gradient_eager(grad: Tensor, x: Tensor) -> Tensor:
    features = grad.shape[-1], x.shape[-1]
    form = (_flat(grad).t() @ _flat(x)).view(2, features[0], 2, features[1])
    folded = form.new_empty(2, *features)
    torch.add(form[0, :, 0], form[1, :, 1], out=folded[0])
    torch.sub(form[1, :, 0], form[0, :, 1], out=folded[1])
    return folded


# ---------------------------------------------------------------------------------------------------------
# Triton


@jit
def _product_kernel(
    X, W, BIAS, OFFSET, SLOPE, RESIDUAL, HIDDEN, ACTIVE, rows, columns, depth, x_row, x_plane, w_plane,
    w_column, w_depth, residual_row, residual_plane, floor,
    CONJUGATE: tl.constexpr, PRODUCTS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """hidden = x W^T + b, or x conj(W)^T + b; active = activation(hidden) + residual.

    X (rows, 2, depth); W (2, columns, depth) by any strides, so that a transposed weight is read in place;
    BIAS (2, columns); HIDDEN and ACTIVE (rows, 2, columns), contiguous, either may be None. A program makes a
    tile (BLOCK_M, BLOCK_N) of both planes. The activation is that of HIDDEN as rounded to its dtype, because
    that is what the backward pass sees. Traffic at least: X, W and RESIDUAL read once, HIDDEN and ACTIVE
    written once; X is read again for every BLOCK_N columns and W for every BLOCK_M rows, as far as they miss
    the L2 cache. 8 rows columns depth FLOPs, 6 with PRODUCTS = 3.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    # GROUP tiles of rows share each tile of the weight while it is in the L2 cache.
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    row = (group * GROUP + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows past the end repeat the last one and are not stored, so loads need no mask for them.
    x_pointers = X + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_row + k[None, :]
    w_pointers = W + column.to(tl.int64)[None, :] * w_column + k.to(tl.int64)[:, None] * w_depth
    re = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    im = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PRODUCTS == 3:
        both = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_DEPTH:
            x_re = tl.load(x_pointers)
            x_im = tl.load(x_pointers + x_plane)
        else:
            x_mask = (k < depth - start)[None, :]
            x_re = tl.load(x_pointers, mask=x_mask, other=0.0)
            x_im = tl.load(x_pointers + x_plane, mask=x_mask, other=0.0)
        if EVEN_DEPTH and EVEN_COLUMNS:
            w_re = tl.load(w_pointers)
            w_im = tl.load(w_pointers + w_plane)
        else:
            w_mask = (k < depth - start)[:, None] & (column < columns)[None, :]
            w_re = tl.load(w_pointers, mask=w_mask, other=0.0)
            w_im = tl.load(w_pointers + w_plane, mask=w_mask, other=0.0)
        if PRODUCTS == 3:
            w_sum = w_re - w_im if CONJUGATE else w_re + w_im
            re = tl.dot(x_re, w_re, re, input_precision="ieee")
            im = tl.dot(x_im, w_im, im, input_precision="ieee")
            both = tl.dot(x_re + x_im, w_sum, both, input_precision="ieee")
        else:
            re = tl.dot(x_re, w_re, re, input_precision="ieee")
            im = tl.dot(x_im, w_re, im, input_precision="ieee")
            # x is negated, not W: Hopper's products can take their left operand from registers.
            if CONJUGATE:
                re = tl.dot(x_im, w_im, re, input_precision="ieee")
                im = tl.dot(-x_re, w_im, im, input_precision="ieee")
            else:
                re = tl.dot(-x_im, w_im, re, input_precision="ieee")
                im = tl.dot(x_re, w_im, im, input_precision="ieee")
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K * w_depth
    if PRODUCTS == 3:
        if CONJUGATE:
            im = -im
        re, im = re - im, both - re - im

    row_there, column_there = row < rows, column < columns
    there = row_there[:, None] & column_there[None, :]
    if BIAS is not None:
        re += tl.load(BIAS + column, mask=column_there, other=0.0).to(tl.float32)[None, :]
        im += tl.load(BIAS + columns + column, mask=column_there, other=0.0).to(tl.float32)[None, :]
    positions = row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
    if HIDDEN is not None:
        rounded_re, rounded_im = re.to(HIDDEN.dtype.element_ty), im.to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + positions, rounded_re, mask=there)
        tl.store(HIDDEN + positions + columns, rounded_im, mask=there)
        re, im = rounded_re.to(tl.float32), rounded_im.to(tl.float32)
    if ACTIVE is not None:
        offset, slope = 0.0, 0.0
        if OFFSET is not None:
            offset = tl.load(OFFSET + column, mask=column_there, other=0.0).to(tl.float32)[None, :]
        if SLOPE is not None:
            slope = tl.load(SLOPE + column, mask=column_there, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "none":
            re, im = activated(re, im, offset, slope, floor, ACTIVATION)
        if RESIDUAL is not None:
            residual_pointers = RESIDUAL + row.to(tl.int64)[:, None] * residual_row + column[None, :]
            re += tl.load(residual_pointers, mask=there, other=0.0).to(tl.float32)
            im += tl.load(residual_pointers + residual_plane, mask=there, other=0.0).to(tl.float32)
        tl.store(ACTIVE + positions, re.to(ACTIVE.dtype.element_ty), mask=there)
        tl.store(ACTIVE + positions + columns, im.to(ACTIVE.dtype.element_ty), mask=there)


@jit
def _weight_gradient_kernel(
    GRAD, X, OUT, rows, columns, depth, split_rows, grad_row, grad_plane, x_row, x_plane,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dW_r = g_r^T x_r + g_i^T x_i, dW_i = g_i^T x_r - g_r^T x_i, summed over the rows of one split.

    GRAD (rows, 2, columns), X (rows, 2, depth), OUT (splits, 2, columns, depth). A program makes a tile
    (BLOCK_N, BLOCK_K) of both planes from ``split_rows`` rows, in one fixed order. Traffic at least: GRAD and
    X read once, OUT written once; 8 rows columns depth FLOPs.
    """
    tiles_n, tiles_k = tl.cdiv(columns, BLOCK_N), tl.cdiv(depth, BLOCK_K)
    program, split = tl.program_id(0), tl.program_id(1)
    group = program // (GROUP * tiles_k)
    group_columns = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = program % (GROUP * tiles_k)
    column = (group * GROUP + within % group_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (within // group_columns) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = split * split_rows
    row = tl.arange(0, BLOCK_M)

    first_row = (first + row).to(tl.int64)
    grad_pointers = GRAD + first_row[None, :] * grad_row + column[:, None]
    x_pointers = X + first_row[:, None] * x_row + k[None, :]
    grad_step, x_step = tl.cast(BLOCK_M, tl.int64) * grad_row, tl.cast(BLOCK_M, tl.int64) * x_row
    re = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    im = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    last = tl.minimum(first + split_rows, rows)
    for start in range(first, last, BLOCK_M):
        if EVEN:
            g_re = tl.load(grad_pointers)
            g_im = tl.load(grad_pointers + grad_plane)
            x_re = tl.load(x_pointers)
            x_im = tl.load(x_pointers + x_plane)
        else:
            there = row < last - start
            g_mask = (column < columns)[:, None] & there[None, :]
            x_mask = there[:, None] & (k < depth)[None, :]
            g_re = tl.load(grad_pointers, mask=g_mask, other=0.0)
            g_im = tl.load(grad_pointers + grad_plane, mask=g_mask, other=0.0)
            x_re = tl.load(x_pointers, mask=x_mask, other=0.0)
            x_im = tl.load(x_pointers + x_plane, mask=x_mask, other=0.0)
        re = tl.dot(g_re, x_re, re, input_precision="ieee")
        im = tl.dot(g_im, x_re, im, input_precision="ieee")
        re = tl.dot(g_im, x_im, re, input_precision="ieee")
        im = tl.dot(-g_re, x_im, im, input_precision="ieee")
        grad_pointers += grad_step
        x_pointers += x_step

    plane = tl.cast(columns, tl.int64) * depth
    pointers = OUT + split * 2 * plane + column.to(tl.int64)[:, None] * depth + k[None, :]
    there = (column < columns)[:, None] & (k < depth)[None, :]
    tl.store(pointers, re.to(OUT.dtype.element_ty), mask=there)
    tl.store(pointers + plane, im.to(OUT.dtype.element_ty), mask=there)


def _as_rows(z: Tensor) -> Tensor:
    """(..., 2, D) as (rows, 2, D) with channels side by side."""
    rows = z.reshape(z.shape[:-2].numel(), *z.shape[-2:])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _strides(rows: Tensor | None) -> tuple[int, ...]:
    """Of rows and planes."""
    return (0, 0) if rows is None else rows.stride()[:2]


def _launch_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    active: Tensor | None,
    *,
    residual: Tensor | None = None,
    products: int = 4,
    adjoint: bool = False,
    activation: str = "none",
    offset: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """Fill ``hidden``, ``active`` or both."""
    x = _as_rows(x)
    residual = None if residual is None else _as_rows(residual)
    bias, offset, slope = (None if t is None else t.contiguous() for t in (bias, offset, slope))
    if adjoint:
        weight = weight.mT
    (rows, _, depth), columns = x.shape, weight.shape[1]

    def run(options: Options) -> None:
        launch(
            _product_kernel,
            (ceil_div(rows, options["BLOCK_M"]) * ceil_div(columns, options["BLOCK_N"]),),
            *(x, weight, bias, offset, slope, residual, hidden, active),
            *(rows, columns, depth),
            *x.stride()[:2],
            *weight.stride(),
            *_strides(residual),
            activation_floor(x, activation),
            CONJUGATE=adjoint,
            PRODUCTS=products,
            ACTIVATION=activation,
            EVEN_COLUMNS=columns % options["BLOCK_N"] == 0,
            EVEN_DEPTH=depth % options["BLOCK_K"] == 0,
            **options,
        )

    kernel = "three_products" if products == 3 else "product" if activation == "none" else "epilogue"
    run(PINNED.choose(kernel, x, min(columns, WIDEST), run, rows, columns, depth, activation))


def _product_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    y = _product_like(x, weight, residual, adjoint)
    hidden, active = (y, None) if residual is None else (None, y)
    _launch_product(x, weight, bias, hidden, active, residual=residual, products=products, adjoint=adjoint)
    return y


def _activated_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    active, hidden = _product_like(x, weight, residual), _product_like(x, weight)
    _launch_product(
        x,
        weight,
        bias,
        hidden,
        active,
        residual=residual,
        activation=activation,
        offset=offset,
        slope=slope,
    )
    return active, hidden


def _weight_gradient_triton(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = _as_rows(grad), _as_rows(x)
    (rows, _, columns), depth = grad.shape, x.shape[2]
    weight_gradient = x.new_empty(2, columns, depth)

    def run(options: Options) -> None:
        tiles = ceil_div(columns, options["BLOCK_N"]) * ceil_div(depth, options["BLOCK_K"])
        # At least four blocks of rows a split: each costs a write and a read of its tile in float32.
        splits = max(1, min(PROGRAMS // tiles, ceil_div(rows, 4 * options["BLOCK_M"])))
        split_rows = options["BLOCK_M"] * ceil_div(ceil_div(rows, splits), options["BLOCK_M"])
        splits = max(1, ceil_div(rows, split_rows)) if rows else 1
        sizes = ((rows, "BLOCK_M"), (columns, "BLOCK_N"), (depth, "BLOCK_K"))
        partial = weight_gradient
        if splits > 1:
            partial = x.new_empty(splits, 2, columns, depth, dtype=torch.float32)
        launch(
            _weight_gradient_kernel,
            (tiles, splits),
            *(grad, x, partial),
            *(rows, columns, depth, split_rows),
            *grad.stride()[:2],
            *x.stride()[:2],
            EVEN=all(size % options[block] == 0 for size, block in sizes),
            **options,
        )
        if splits > 1:
            weight_gradient.copy_(partial.sum(0))

    run(PINNED.choose("weight_gradient", x, min(columns, WIDEST), run, rows, columns, depth))
    return weight_gradient


# ---------------------------------------------------------------------------------------------------------
# Which of the two runs


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


# ---------------------------------------------------------------------------------------------------------
# Operations


def _product_like(x: Tensor, weight: Tensor, residual: Tensor | None = None, adjoint: bool = False) -> Tensor:
    """An empty tensor for a product, with a residual in the dtype of the sum."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[2 if adjoint else 1]), dtype=dtype)


@operator
def _complex_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    def run(by_triton: bool) -> Tensor:
        implementation = _product_triton if by_triton else _product_eager
        return implementation(x, weight, bias, residual, products, adjoint)

    operation = "three_products" if products == 3 else "product"
    return run(_runs_triton(operation, x, tuple(weight.shape), run))


@_complex_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    return _product_like(x, weight, residual, adjoint)


@operator
def _complex_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    def run(by_triton: bool) -> Tensor:
        return _weight_gradient_triton(grad, x) if by_triton else _weight_gradient_eager(grad, x)

    return run(_runs_triton("weight_gradient", x, (2, grad.shape[-1], x.shape[-1]), run))


@_complex_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(2, grad.shape[-1], x.shape[-1])


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
    if use_triton(x):
        return _activated_triton(x, weight, bias, offset, slope, residual, activation)
    hidden = _product_eager(x, weight, bias, None, 4, False)
    active = activation_eager(hidden, activation, offset, slope)
    return _plus(active, residual), hidden


@_complex_product_activated.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return _product_like(x, weight, residual), _product_like(x, weight)


# ---------------------------------------------------------------------------------------------------------
# Gradients. The product, the product with the conjugate weight and the weight's gradient are each other's
# gradients, so complex_linear has gradients of any order.


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, residual, ctx.products, ctx.adjoint = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
    ctx.dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


def _weight_gradient_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, x = ctx.saved_tensors
    return (
        _complex_product(x, grad, None, None, 4, False) if ctx.needs_input_grad[0] else None,
        _complex_product(rows, grad, None, None, 4, True) if ctx.needs_input_grad[1] else None,
    )


def _activated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, slope, residual, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        output[1],
        offset,
        slope,
    )
    ctx.dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _activated_backward(
    ctx: Any, grad_active: Tensor | None, grad_hidden: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, hidden, offset, slope = ctx.saved_tensors
    grad, grad_offset, grad_slope, grad_residual = grad_hidden, None, None, None
    if grad_active is not None:
        if ctx.needs_input_grad[5]:
            grad_residual = grad_active.to(ctx.residual_dtype)
        if any(ctx.needs_input_grad[:5]):
            grad, sums = complex_activation_backward(
                grad_active.to(hidden.dtype), hidden, ctx.activation, offset, slope
            )
            grad_offset, grad_slope = (
                None if t is None else sums[k].to(t.dtype) for k, t in enumerate((offset, slope))
            )
            grad = grad if grad_hidden is None else grad + grad_hidden
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        gradients = _gradients(ctx.needs_input_grad, grad.to(ctx.dtype), x, weight, 4, False)
    return (
        *gradients,
        grad_offset if ctx.needs_input_grad[3] else None,
        grad_slope if ctx.needs_input_grad[4] else None,
        grad_residual,
        None,
    )


_complex_product.register_autograd(_product_backward, setup_context=_product_setup)
_complex_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_weight_gradient_setup)
_complex_product_activated.register_autograd(_activated_backward, setup_context=_activated_setup)


# ---------------------------------------------------------------------------------------------------------
# Public functions


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


def compile_cases() -> dict[str, Callable[[], object]]:
    """The launches to compile ahead of time: each pinned configuration, and each variant that matters."""
    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        # Narrow tiles are pinned for half precision only.
        for width in (64, 256) if dtype == torch.bfloat16 else (256,):
            cases |= _compile_cases(dtype, width)
    return cases


def _compile_cases(dtype: torch.dtype, width: int) -> dict[str, Callable[[], object]]:
    def case(
        sizes: tuple[int, int, int], run: Callable[..., object], *parameters: str
    ) -> Callable[[], object]:
        rows, columns, depth = sizes

        def call() -> object:
            tensors = {
                "x": torch.empty(rows, 2, depth, dtype=dtype),
                "weight": torch.empty(2, columns, depth, dtype=dtype),
                "bias": torch.empty(2, columns, dtype=dtype),
                "grad": torch.empty(rows, 2, columns, dtype=dtype),
                "offset": torch.empty(columns),
                "slope": torch.empty(columns),
            }
            return run(*(tensors[name] for name in parameters))

        return call

    even, uneven = (4096, width, 512), (4095, width - 16, 496)
    # Few rows: a weight gradient without splits.
    few = (64, width, 512)
    linear = ("x", "weight", "bias")
    runs: dict[str, Callable[[], object]] = {
        "forward": case(even, lambda x, w, b: _product_triton(x, w, b, None, 4, False), *linear),
        "forward uneven": case(uneven, lambda x, w, b: _product_triton(x, w, b, None, 4, False), *linear),
        "backward x": case(even, lambda g, w: _product_triton(g, w, None, None, 4, True), "grad", "weight"),
        "backward weight": case(even, _weight_gradient_triton, "grad", "x"),
        "backward weight uneven": case(uneven, _weight_gradient_triton, "grad", "x"),
        "mod_swish": case(
            even,
            lambda x, w, b, o, s, r: _activated_triton(x, w, b, o, s, r, "mod_swish"),
            *linear,
            "offset",
            "slope",
            "grad",
        ),
    }
    if width > WIDEST:
        runs |= {
            "residual": case(
                even, lambda x, w, r: _product_triton(x, w, None, r, 4, False), "x", "weight", "grad"
            ),
            "three products": case(
                even, lambda x, w: _product_triton(x, w, None, None, 3, False), "x", "weight"
            ),
            "backward weight few": case(few, _weight_gradient_triton, "grad", "x"),
            "mod_relu": case(
                even,
                lambda x, w, o: _activated_triton(x, w, None, o, None, None, "mod_relu"),
                *("x", "weight", "offset"),
            ),
            "split_gelu": case(
                even,
                lambda x, w: _activated_triton(x, w, None, None, None, None, "split_gelu"),
                "x",
                "weight",
            ),
        }
    name = str(dtype).removeprefix("torch.")
    return {f"{name} {width} {label}": run for label, run in runs.items()}
