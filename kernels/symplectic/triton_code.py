"""Flows in Triton.

All kernels hold whole rows of a force or gradient, so BLOCK_D is D rounded up to a power of two. Where
BLOCK_K is less, the products over D run in pieces of BLOCK_K, whose operands are read again (from caches):
those of a whole row do not fit on chip when D is large or the dtype is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.launch import Options, ceil_div, launch, next_power_of_2, pinned_beside, target_name
from kernels.symplectic.scheme import (
    POTENTIALS,
    Scheme,
    Weights,
    copied,
    first_kick,
    reversed_scheme,
    to_fixed_point,
)
from kernels.triton_import import jit, jit_unspecialised, tl

PINNED = pinned_beside(__file__)
# Programs of the parameter kernel, about two for every multiprocessor of a large GPU.
PROGRAMS = 264


@jit
def _rounded(x):
    """The nearest whole number, ties to even as torch.round, and odd: 2^23 leaves no bits for a fraction."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -size, size)


@jit
def _moved(state, change, inside, EXACT: tl.constexpr):
    """The state after a change inside (whole if EXACT), and its largest size, infinite if it does not fit."""
    if EXACT:
        whole = _rounded(change)
        fits = tl.abs(whole) < 2147483648.0
        size = tl.where(fits, tl.abs(state.to(tl.float32) + whole), float("inf"))
        moved = state + tl.where(fits & inside, whole, 0.0).to(tl.int32)
        largest = tl.max(tl.where(inside, size, 0.0))
    else:
        moved = tl.where(inside, state + change, state)
        largest = 0.0
    return moved, largest


@jit
def _where_moved(coefficient, row, tokens, column, width):
    """Where a state is moved: inside, or nowhere if the coefficient is 0."""
    return (row[:, None] < tl.where(coefficient != 0, tokens, 0)) & (column[None, :] < width)


@jit
def _normal_cdf(a):
    return 0.5 * (1.0 + tl.math.erf(a * 0.7071067811865476))


@jit
def _normal_density(a):
    return 0.3989422804014327 * tl.exp(-0.5 * a * a)


@jit
def _slope_of(a, PHI: tl.constexpr):
    """phi'(a)."""
    if PHI == 0:
        return a * _normal_cdf(a)
    elif PHI == 1:
        sigmoid = tl.sigmoid(a)
        return sigmoid * (1.0 + a * (1.0 - sigmoid))
    elif PHI == 2:
        return _normal_cdf(a) + a * _normal_density(a)
    else:
        return tl.sigmoid(a)


@jit
def _curvature_of(a, PHI: tl.constexpr):
    """phi''(a)."""
    if PHI == 0:
        return _normal_cdf(a) + a * _normal_density(a)
    elif PHI == 2:
        return (2.0 - a * a) * _normal_density(a)
    else:
        sigmoid = tl.sigmoid(a)
        if PHI == 1:
            return sigmoid * (1.0 - sigmoid) * (2.0 + a * (1.0 - 2.0 * sigmoid))
        else:
            return sigmoid * (1.0 - sigmoid)


@jit
def _tile(pointer, row, rows, column, columns):
    """A tile of a contiguous matrix (rows, columns), 0 outside."""
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(pointer + at, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0)


@jit
def _value(x, inverse, EXACT: tl.constexpr):
    """A tile of q as a number, whatever it is held as."""
    if EXACT:
        x = x.to(tl.float32) * inverse
    return x


@jit
def _operand(x, inverse, EXACT: tl.constexpr, dtype: tl.constexpr):
    """A tile of q as an operand of the products."""
    return _value(x, inverse, EXACT).to(dtype)


@jit
def _bias(pointer, row, rows, unit, hidden, BY_TOKEN: tl.constexpr):
    """b1 of these hidden units as a tile of one row, or of a row for each of these tokens."""
    if BY_TOKEN:
        b1 = _tile(pointer, row, rows, unit, hidden).to(tl.float32)
    else:
        b1 = tl.load(pointer + unit, mask=unit < hidden, other=0)[None, :]
    return b1


@jit
def _inner(
    x_ptr, x_row, x_rows, w_ptr, w_row, w_rows, width, inverse,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X W^T of rows of X (in units of 1 / inverse if EXACT) and rows of W, over the width in pieces."""
    product = tl.zeros((BLOCK_X, BLOCK_W), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        w = _tile(w_ptr, w_row, w_rows, column, width)
        x = _operand(_tile(x_ptr, x_row, x_rows, column, width), inverse, EXACT, w.dtype)
        product = tl.dot(x, tl.trans(w), product, input_precision=PRECISION)
    return product


@jit
def _minus_force(
    x, q_ptr, row, tokens, w1_ptr, b1_ptr, w2_ptr, width, units, hidden, inverse,
    PHI: tl.constexpr, EXACT: tl.constexpr, BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W1^T (w2 * phi'(W1 q + b1)) over the first ``units`` hidden units: all of them, or none."""
    column = tl.arange(0, BLOCK_D)
    minus_f = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, units, BLOCK_H):
        unit = start + tl.arange(0, BLOCK_H)
        b1 = _bias(b1_ptr, row, tokens, unit, hidden, BY_TOKEN)
        w2 = tl.load(w2_ptr + unit, mask=unit < hidden, other=0)
        w1 = _tile(w1_ptr, unit, hidden, column, width)
        if BLOCK_K == BLOCK_D:
            a = tl.dot(x, tl.trans(w1), input_precision=PRECISION)
        else:
            a = _inner(
                q_ptr, row, tokens, w1_ptr, unit, hidden, width, inverse, EXACT,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
            )  # fmt: skip
        g = (_slope_of(a + b1, PHI) * w2[None, :]).to(w1.dtype)
        minus_f = tl.dot(g, w1, minus_f, input_precision=PRECISION)
    return minus_f


@jit_unspecialised("first", "last")
def _flow_kernel(
    q_ptr, p_ptr, w1_ptr, b1_ptr, w2_ptr, stages_ptr, peak_ptr,
    first, last, tokens, width, hidden, confinement, scale, inverse,
    PHI: tl.constexpr, EXACT: tl.constexpr, BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stages first to last - 1 of BLOCK_M tokens, in place. RESIDENT holds q and p on chip all the time.

    Memory traffic of a launch: 16 tokens D bytes for the state, 4 tokens D more where it is not resident, and
    W1 once a program and force, from the caches (where BLOCK_K < BLOCK_D twice, and q once for every BLOCK_H
    hidden units). BY_TOKEN the rows of b1, tokens hidden numbers a force. Arithmetic: 4 tokens D hidden FLOPs
    a force.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    peak = tl.load(peak_ptr + tl.program_id(0))
    if RESIDENT:
        q = tl.load(q_ptr + at, mask=inside, other=0)
        p = tl.load(p_ptr + at, mask=inside, other=0)
        for stage in range(first, last):
            kick = tl.load(stages_ptr + 2 * stage)
            drift = tl.load(stages_ptr + 2 * stage + 1)
            x = _operand(q, inverse, EXACT, w1_ptr.dtype.element_ty)
            minus_f = _minus_force(
                x, q_ptr, row, tokens, w1_ptr, b1_ptr, w2_ptr, width, tl.where(kick != 0, hidden, 0), hidden,
                inverse, PHI, EXACT, BY_TOKEN, PRECISION, BLOCK_M, BLOCK_H, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            minus_f += confinement * _value(q, inverse, EXACT)
            moved = _where_moved(kick, row, tokens, column, width)
            p, size = _moved(p, (-kick * scale) * minus_f, moved, EXACT)
            peak = tl.maximum(peak, size)
            moved = _where_moved(drift, row, tokens, column, width)
            q, size = _moved(q, drift * p.to(tl.float32), moved, EXACT)
            peak = tl.maximum(peak, size)
        tl.store(q_ptr + at, q, mask=inside)
        tl.store(p_ptr + at, p, mask=inside)
    else:
        kick = tl.load(stages_ptr + 2 * first)
        drift = tl.load(stages_ptr + 2 * first + 1)
        x = 0
        if BLOCK_K == BLOCK_D:
            x = _operand(tl.load(q_ptr + at, mask=inside, other=0), inverse, EXACT, w1_ptr.dtype.element_ty)
        minus_f = _minus_force(
            x, q_ptr, row, tokens, w1_ptr, b1_ptr, w2_ptr, width, tl.where(kick != 0, hidden, 0), hidden,
            inverse, PHI, EXACT, BY_TOKEN, PRECISION, BLOCK_M, BLOCK_H, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        minus_f += confinement * _value(tl.load(q_ptr + at, mask=inside, other=0), inverse, EXACT)
        # Every thread has read its pieces of q before any of them is overwritten.
        tl.debug_barrier()
        p = tl.load(p_ptr + at, mask=inside, other=0)
        moved = _where_moved(kick, row, tokens, column, width)
        p, size = _moved(p, (-kick * scale) * minus_f, moved, EXACT)
        peak = tl.maximum(peak, size)
        tl.store(p_ptr + at, p, mask=inside)
        # Keeps the compiler from holding q beside all that led to p.
        tl.debug_barrier()
        q = tl.load(q_ptr + at, mask=inside, other=0)
        moved = _where_moved(drift, row, tokens, column, width)
        q, size = _moved(q, drift * p.to(tl.float32), moved, EXACT)
        peak = tl.maximum(peak, size)
        tl.store(q_ptr + at, q, mask=moved)
    tl.store(peak_ptr + tl.program_id(0), peak)


@jit
def _adjoint_kernel(
    q_ptr, grad_q_ptr, grad_p_ptr, w1_ptr, b1_ptr, w2_ptr, grad_b1_ptr,
    kick, tokens, width, hidden, confinement, inverse,
    PHI: tl.constexpr, EXACT: tl.constexpr, BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_q -= kick (W1^T (w2 phi''(W1 q + b1) (W1 grad_p)) + c grad_p) of BLOCK_M tokens, in place.

    With BIAS_GRADIENT what the kick adds to the gradient of the rows of b1 is added to grad_b1.

    Memory traffic: 16 tokens D bytes, and W1 once a program, from the caches (where BLOCK_K < BLOCK_D three
    times, and q and grad_p once for every BLOCK_H hidden units). BY_TOKEN the rows of b1, tokens hidden
    numbers, and 8 tokens hidden bytes for their gradient. Arithmetic: 6 tokens D hidden FLOPs.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    if BLOCK_K == BLOCK_D:
        x = _operand(_tile(q_ptr, row, tokens, column, width), inverse, EXACT, dtype)
        y = _tile(grad_p_ptr, row, tokens, column, width).to(dtype)
    product = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_H):
        unit = start + tl.arange(0, BLOCK_H)
        b1 = _bias(b1_ptr, row, tokens, unit, hidden, BY_TOKEN)
        w2 = tl.load(w2_ptr + unit, mask=unit < hidden, other=0)
        w1 = _tile(w1_ptr, unit, hidden, column, width)
        if BLOCK_K == BLOCK_D:
            a = tl.dot(x, tl.trans(w1), input_precision=PRECISION)
            b = tl.dot(y, tl.trans(w1), input_precision=PRECISION)
        else:
            a = _inner(
                q_ptr, row, tokens, w1_ptr, unit, hidden, width, inverse, EXACT,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
            )  # fmt: skip
            b = _inner(
                grad_p_ptr, row, tokens, w1_ptr, unit, hidden, width, 1.0, False,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
            )  # fmt: skip
        h = _curvature_of(a + b1, PHI) * w2[None, :] * b
        if BIAS_GRADIENT:
            at = row.to(tl.int64)[:, None] * hidden + unit[None, :]
            valid = (row[:, None] < tokens) & (unit[None, :] < hidden)
            before = tl.load(grad_b1_ptr + at, mask=valid, other=0)
            tl.store(grad_b1_ptr + at, before - kick * h, mask=valid)
        product = tl.dot(h.to(dtype), w1, product, input_precision=PRECISION)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    # Keeps the compiler from holding grad_p in float32 all through the loop.
    tl.debug_barrier()
    product += confinement * tl.load(grad_p_ptr + at, mask=inside, other=0)
    grad_q = tl.load(grad_q_ptr + at, mask=inside, other=0)
    tl.store(grad_q_ptr + at, grad_q - kick * product, mask=inside)


@jit
def _parameter_kernel(
    q_ptr, grad_p_ptr, w1_ptr, b1_ptr, w2_ptr, grad_w1_ptr, grad_b1_ptr, grad_w2_ptr,
    kick, tokens, share, width, hidden, inverse,
    PHI: tl.constexpr, EXACT: tl.constexpr, BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What a kick adds to the parameter gradients, of BLOCK_H hidden units and ``share`` tokens.

    It is added to the program's own part of grad_w1 (splits, hidden, D), grad_b1 and grad_w2, both
    (splits, hidden). BY_TOKEN grad_b1 is left to the adjoint kernel.

    Memory traffic: 8 tokens D bytes for every BLOCK_H hidden units (twice that where BLOCK_K < BLOCK_D), and
    8 splits hidden D bytes for the sums. BY_TOKEN the rows of b1, tokens hidden numbers. Arithmetic: 8 tokens
    D hidden FLOPs.
    """
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    w2 = tl.load(w2_ptr + unit, mask=unit < hidden, other=0)
    if BLOCK_K == BLOCK_D:
        w1 = _tile(w1_ptr, unit, hidden, column, width)
    grad_w1 = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    grad_b1 = tl.zeros((BLOCK_H,), dtype=tl.float32)
    grad_w2 = tl.zeros((BLOCK_H,), dtype=tl.float32)
    end = tl.minimum(tokens, (split + 1) * share)
    for start in range(split * share, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        x = _operand(_tile(q_ptr, row, end, column, width), inverse, EXACT, dtype)
        y = _tile(grad_p_ptr, row, end, column, width).to(dtype)
        if BLOCK_K == BLOCK_D:
            a = tl.dot(x, tl.trans(w1), input_precision=PRECISION)
            b = tl.dot(y, tl.trans(w1), input_precision=PRECISION)
        else:
            a = _inner(
                q_ptr, row, end, w1_ptr, unit, hidden, width, inverse, EXACT,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
            )  # fmt: skip
            b = _inner(
                grad_p_ptr, row, end, w1_ptr, unit, hidden, width, 1.0, False,
                PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
            )  # fmt: skip
        a += _bias(b1_ptr, row, end, unit, hidden, BY_TOKEN)
        slope = _slope_of(a, PHI)
        h = _curvature_of(a, PHI) * w2[None, :] * b
        grad_w2 += tl.sum(slope * b, 0)
        if not BY_TOKEN:
            grad_b1 += tl.sum(h, 0)
        # Rows outside have y = 0 and, by b = 0, h = 0.
        grad_w1 = tl.dot(tl.trans((slope * w2[None, :]).to(dtype)), y, grad_w1, input_precision=PRECISION)
        grad_w1 = tl.dot(tl.trans(h.to(dtype)), x, grad_w1, input_precision=PRECISION)
    units = unit.to(tl.int64) + split.to(tl.int64) * hidden
    valid = unit < hidden
    at = units[:, None] * width + column[None, :]
    inside = valid[:, None] & (column[None, :] < width)
    before = tl.load(grad_w1_ptr + at, mask=inside, other=0)
    tl.store(grad_w1_ptr + at, before - kick * grad_w1, mask=inside)
    if not BY_TOKEN:
        before = tl.load(grad_b1_ptr + units, mask=valid, other=0)
        tl.store(grad_b1_ptr + units, before - kick * grad_b1, mask=valid)
    before = tl.load(grad_w2_ptr + units, mask=valid, other=0)
    tl.store(grad_w2_ptr + units, before - kick * grad_w2, mask=valid)


def _operands(weights: Weights) -> Weights:
    """The weights as the kernels read them."""
    w1, b1, w2 = weights[:3]
    b1 = b1 if weights.biased_by_token else b1.float()
    return weights._replace(w1=w1.contiguous(), b1=b1.contiguous(), w2=w2.float().contiguous())


def _precision(w1: Tensor) -> str:
    """How float32 is multiplied: by three products in TF32, about as accurate as one in float32.

    NVIDIA's tensor cores have no float32. Where rows are wide the operands of the three do not fit on chip.
    """
    return "tf32x3" if target_name(w1).startswith("sm_") and w1.shape[1] <= 512 else "ieee"


def _constants(weights: Weights, scheme: Scheme) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "PHI": POTENTIALS.index(weights.phi),
        "EXACT": scheme.scale > 0,
        "BY_TOKEN": weights.biased_by_token,
        "PRECISION": _precision(weights.w1),
    }


def _options(kernel: str, w1: Tensor) -> dict[str, int]:
    """The pinned options, with the blocks along D for this width."""
    width = w1.shape[1]
    options = dict(PINNED.options(kernel, w1, width))
    options["BLOCK_D"] = max(16, next_power_of_2(width))
    options["BLOCK_K"] = min(options["BLOCK_K"], options["BLOCK_D"])
    return options


@functools.lru_cache(maxsize=64)
def _stages(kicks: tuple[float, ...], drifts: tuple[float, ...], device: torch.device) -> Tensor:
    """The coefficients (stages, 2) in float32, copied to the device once."""
    return torch.tensor(list(zip(kicks, drifts, strict=True)), dtype=torch.float32, device=device)


def _launch_stages(
    q: Tensor, p: Tensor, weights: Weights, scheme: Scheme, stages: range, options: Options
) -> Tensor:
    """Run stages in place, in one launch if the state is resident, else one each; returns the peaks."""
    tokens, width = q.shape
    programs = ceil_div(tokens, options["BLOCK_M"])
    coefficients = _stages(tuple(scheme.kicks), tuple(scheme.drifts), q.device)
    peaks = torch.zeros(max(1, programs), dtype=torch.float32, device=q.device)
    step = max(1, len(stages)) if options["RESIDENT"] else 1
    for first in stages[::step]:
        launch(
            _flow_kernel, (programs,),
            q, p, *weights[:3], coefficients, peaks, first, first + step,
            tokens, width, len(weights.w1), weights.confinement, scheme.unit, 1 / scheme.unit,
            **_constants(weights, scheme), **options,
        )  # fmt: skip
    return peaks


def flow(q: Tensor, p: Tensor, weights: Weights, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """As the eager ``flow``."""
    largest = []
    if scheme.scale and q.is_floating_point():
        (q, largest_q), (p, largest_p) = (to_fixed_point(x.contiguous(), scheme.scale) for x in (q, p))
        largest = [largest_q, largest_p]
    else:
        q, p = copied(q), copied(p)
    options = _options("flow", weights.w1)
    peaks = _launch_stages(q, p, _operands(weights), scheme, range(len(scheme.kicks)), options)
    return q, p, torch.stack([peaks.amax(), *largest]).amax()


class _Partial(NamedTuple):
    """Parameter gradients by shares of the tokens."""

    w1: Tensor  # (splits, hidden, D)
    b1: Tensor  # (splits, hidden), or (1, tokens, hidden) of rows for each token
    w2: Tensor  # (splits, hidden)


def _partial(tokens: int, weights: Weights) -> _Partial:
    options = _options("parameters", weights.w1)
    hidden, width = weights.w1.shape
    wanted = ceil_div(PROGRAMS, ceil_div(hidden, options["BLOCK_H"]))
    splits = max(1, min(wanted, ceil_div(tokens, options["BLOCK_M"])))
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=weights.w1.device)
    bias = (1, tokens, hidden) if weights.biased_by_token else (splits, hidden)
    return _Partial(zeros((splits, hidden, width)), zeros(bias), zeros((splits, hidden)))


def _launch_adjoint(
    q: Tensor,
    grad_q: Tensor,
    grad_p: Tensor,
    weights: Weights,
    partial: _Partial | None,
    kick: float,
    scheme: Scheme,
) -> None:
    """grad_q becomes that before a kick at q, and the partial sums take in what the kick adds."""
    tokens, width = q.shape
    hidden = len(weights.w1)
    constants = _constants(weights, scheme)
    options = _options("adjoint", weights.w1)
    bias_gradient = weights.biased_by_token and partial is not None
    launch(
        _adjoint_kernel, (ceil_div(tokens, options["BLOCK_M"]),),
        q, grad_q, grad_p, *weights[:3], partial.b1 if partial else weights.w2,
        kick, tokens, width, hidden, weights.confinement, 1 / scheme.unit,
        BIAS_GRADIENT=bias_gradient, **constants, **options,
    )  # fmt: skip
    if partial is None:
        return
    options = _options("parameters", weights.w1)
    splits = len(partial.w1)
    share = ceil_div(ceil_div(tokens, splits), options["BLOCK_M"]) * options["BLOCK_M"]
    launch(
        _parameter_kernel, (ceil_div(hidden, options["BLOCK_H"]), splits),
        q, grad_p, *weights[:3], *partial, kick, tokens, share, width, hidden, 1 / scheme.unit,
        **constants, **options,
    )  # fmt: skip


def _summed(partial: _Partial | None, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    w1, b1, w2 = weights[:3]
    if partial is None:
        return w1.new_empty(0), b1.new_empty(0), w2.new_empty(0)
    return partial.w1.sum(0).to(w1.dtype), partial.b1.sum(0).to(b1.dtype), partial.w2.sum(0).to(w2.dtype)


def flow_backward(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    weights: Weights,
    scheme: Scheme,
    parameters: bool,
    rebuilt: bool,
) -> tuple[Tensor, ...]:
    """As the eager ``flow_backward``: the flow kernel undoes a stage, then its adjoint is taken."""
    grad_q, grad_p, q, p = (copied(x) for x in (grad_q, grad_p, end_q, end_p))
    operands = _operands(weights)
    options = _options("flow", weights.w1)
    partial = _partial(len(q), weights) if parameters else None
    # Its stage k undoes the drift of the kth last stage, and before that the kick of the stage after it.
    undo = reversed_scheme(scheme)
    undone = len(undo.kicks) if rebuilt else len(scheme.kicks) - first_kick(scheme)
    for back in range(len(undo.kicks)):
        if back < undone and (undo.kicks[back] or undo.drifts[back]):
            _launch_stages(q, p, operands, undo, range(back, back + 1), options)
        if back == len(scheme.kicks):
            break
        kick, drift = scheme.kicks[-1 - back], scheme.drifts[-1 - back]
        if drift:
            grad_p.add_(grad_q, alpha=drift)
        if kick:
            _launch_adjoint(q, grad_q, grad_p, operands, partial, kick, scheme)
    states = (q, p) if rebuilt else (q.new_empty(0), p.new_empty(0))
    return *states, grad_q, grad_p, *_summed(partial, weights)


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, with tensors on the default device."""

    tokens = 4096

    def make_weights(dtype: torch.dtype, width: int, phi: str, by_token: bool = False) -> Weights:
        make = functools.partial(torch.empty, dtype=dtype)
        # As many hidden units as stage 2 has are no multiple of 16.
        hidden = 4 * width - by_token
        b1 = make(tokens, hidden) if by_token else make(hidden)
        return Weights(make(hidden, width), b1, make(hidden), phi, 0.0)

    def case(
        dtype: torch.dtype,
        width: int,
        phi: str = "gelu_integral",
        scale: float = 2.0**20,
        backward: bool = True,
        by_token: bool = False,
    ) -> None:
        grad = torch.empty(tokens, width)
        end = torch.empty(tokens, width, dtype=torch.int32 if scale else torch.float32)
        weights = make_weights(dtype, width, phi, by_token)
        # A single kick: whatever the stages, the launches compile to the same.
        scheme = Scheme((1.0,), (0.0,), scale)
        flow(end, end, weights, scheme)
        if backward:
            flow_backward(grad, grad, end, end, weights, scheme, True, True)

    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in (64, 128, 256, 512, 1024):
            cases[f"{name} {width} exact"] = functools.partial(case, dtype, width)
            cases[f"{name} {width} exact, b1 by token"] = functools.partial(case, dtype, width, by_token=True)
    for phi in ("silu", "gelu"):
        cases[f"bfloat16 64 {phi}"] = functools.partial(case, torch.bfloat16, 64, phi)
    cases["bfloat16 128 float"] = functools.partial(case, torch.bfloat16, 128, scale=0.0, backward=False)
    cases["float32 512 float"] = functools.partial(case, torch.float32, 512, scale=0.0, by_token=True)
    return cases
