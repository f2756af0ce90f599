"""The planar product and the gradient of its weight in Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.complex_activation.eager import activation_floor
from kernels.complex_activation.triton_code import activated
from kernels.complex_linear.eager import empty_product
from kernels.launch import Options, ceil_div, contiguous, launch, pinned_beside
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)
# Pinned for narrow products and for all others.
WIDEST = 128
# Programs that fill a large GPU: where a grid has fewer, the rows are split among more.
PROGRAMS = 256


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
    residual: Tensor | None = None,
    *,
    products: int = 4,
    adjoint: bool = False,
    activation: str = "none",
    offset: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """Fill ``hidden``, ``active`` or both."""
    x = _as_rows(x)
    residual = None if residual is None else _as_rows(residual)
    bias, offset, slope = map(contiguous, (bias, offset, slope))
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


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    """x W^T + b, or x conj(W)^T + b, plus a residual."""
    y = empty_product(x, weight, residual, adjoint)
    hidden, active = (y, None) if residual is None else (None, y)
    _launch_product(x, weight, bias, hidden, active, residual, products=products, adjoint=adjoint)
    return y


def product_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Active and hidden, as of ``complex_linear_activated``."""
    active, hidden = empty_product(x, weight, residual), empty_product(x, weight)
    _launch_product(
        x, weight, bias, hidden, active, residual, activation=activation, offset=offset, slope=slope
    )
    return active, hidden


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """dW of y = x W^T from the gradient of y."""
    grad, x = _as_rows(grad), _as_rows(x)
    (rows, _, columns), depth = grad.shape, x.shape[2]
    folded = x.new_empty(2, columns, depth)

    def run(options: Options) -> None:
        tiles = ceil_div(columns, options["BLOCK_N"]) * ceil_div(depth, options["BLOCK_K"])
        # At least four blocks of rows a split: each costs a write and a read of its tile in float32.
        splits = max(1, min(PROGRAMS // tiles, ceil_div(rows, 4 * options["BLOCK_M"])))
        split_rows = options["BLOCK_M"] * ceil_div(ceil_div(rows, splits), options["BLOCK_M"])
        splits = max(1, ceil_div(rows, split_rows)) if rows else 1
        sizes = ((rows, "BLOCK_M"), (columns, "BLOCK_N"), (depth, "BLOCK_K"))
        partial = folded
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
            folded.copy_(partial.sum(0))

    run(PINNED.choose("weight_gradient", x, min(columns, WIDEST), run, rows, columns, depth))
    return folded


def compile_cases() -> dict[str, Callable[[], object]]:
    """The launches to compile ahead of time: each pinned configuration, and each variant that matters."""
    # Narrow tiles are pinned for half precision only.
    kinds = ((torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 256))
    return {
        f"{str(dtype).removeprefix('torch.')} {width} {label}": run
        for dtype, width in kinds
        for label, run in _compile_cases(dtype, width).items()
    }


def _compile_cases(dtype: torch.dtype, width: int) -> dict[str, Callable[[], object]]:
    def case(
        run: Callable[..., object], rows: int = 4096, columns: int = width, depth: int = 512
    ) -> Callable[[], object]:
        """``run`` of x, a weight, a bias, a gradient and a parameter of an activation."""

        def call() -> object:
            x, grad = (torch.empty(rows, 2, features, dtype=dtype) for features in (depth, columns))
            weight, bias = torch.empty(2, columns, depth, dtype=dtype), torch.empty(2, columns, dtype=dtype)
            return run(x, weight, bias, grad, torch.empty(columns))

        return call

    uneven = (4095, width - 16, 496)
    runs = {
        "forward": case(lambda x, w, b, *_: product(x, w, b, None, 4, False)),
        "forward uneven": case(lambda x, w, b, *_: product(x, w, b, None, 4, False), *uneven),
        "backward x": case(lambda x, w, b, grad, _: product(grad, w, None, None, 4, True)),
        "backward weight": case(lambda x, w, b, grad, _: weight_gradient(grad, x)),
        "backward weight uneven": case(lambda x, w, b, grad, _: weight_gradient(grad, x), *uneven),
        "mod_swish": case(lambda x, w, b, grad, row: product_activated(x, w, b, row, row, grad, "mod_swish")),
    }
    if width > WIDEST:
        runs |= {
            "residual": case(lambda x, w, b, grad, _: product(x, w, None, grad, 4, False)),
            "three products": case(lambda x, w, *_: product(x, w, None, None, 3, False)),
            # Few rows: a weight gradient without splits.
            "backward weight few": case(lambda x, w, b, grad, _: weight_gradient(grad, x), 64),
            "mod_relu": case(
                lambda x, w, b, grad, row: product_activated(x, w, None, row, None, None, "mod_relu")
            ),
            "split_gelu": case(
                lambda x, w, *_: product_activated(x, w, None, None, None, None, "split_gelu")
            ),
        }
    return runs
