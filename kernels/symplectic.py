"""Hamiltonian flow of every token, undone by its backward pass.

H = |p|^2/2 + V(q) with V(q) = w2 . phi(W1 q + b1) + c |q|^2/2, where b1 is the same for all tokens or a row
for each of them, and c, the stiffness of a spring, may be 0.

A splitting scheme is a list of stages. Stage k is a kick and a drift,

    p += kicks[k] F(q)         F(q) = -W1^T (w2 * phi'(W1 q + b1)) - c q
    q += drifts[k] p

and a coefficient of exactly 0 leaves its half out. T leapfrog steps of dt are T + 1 stages: kicks
[dt/2, dt, ..., dt, dt/2], drifts [dt, ..., dt, 0].

With ``scale`` > 0 the state is a pair of int32 in units of 1 / scale. A kick adds rint(scale kicks[k] F(q)),
a drift rint(drifts[k] p). Rounding is odd, rint(-x) = -rint(x), and a force depends on q only, so the stages
with negated coefficients, last one first, subtract the very integers that were added: the initial state comes
back to the last bit, however many stages there are, and the backward pass needs the final state only. What
that takes is that a force has the same bits whenever it is computed from the same q. The forward pass, the
reconstruction and the backward pass run the same products of the same shapes on equally aligned memory in the
eager code, and the same compiled kernel on a GPU. Weights, the number of threads and the precision settings
of torch must not change in between.

With ``scale`` = 0 the state is floating point and the backward pass undoes the stages up to rounding.

Gradients are those of the discrete map; rounding counts as the identity.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import (
    Options,
    ceil_div,
    launch,
    next_power_of_2,
    pinned_beside,
    target_name,
    use_triton,
)  # fmt: skip
from kernels.operator import operator
from kernels.triton_import import jit, jit_unspecialised, tl

PINNED = pinned_beside(__file__)

# The potentials by name, in the order of the kernels' constant PHI.
POTENTIALS = ("gelu_integral", "silu", "gelu", "softplus")
# An int32 holds whole numbers of smaller size than this.
LIMIT = 2.0**31
# Tokens whose hidden activations the eager code holds at a time. Few are slow, because libraries pack the
# weights anew for each product.
CHUNK = 2048
# Programs of the parameter kernel, about two for every multiprocessor of a large GPU.
PROGRAMS = 264

# Of ``undone_flow``.
Advance = Callable[..., tuple[Tensor, Tensor, Tensor]]
Undo = Callable[..., Sequence[Tensor]]
Replace = Callable[..., Sequence[Tensor | None] | None]

SQRT_HALF = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)


# ---- The potential and its derivatives


def _phi(a: Tensor, phi: str) -> Tensor:
    match phi:
        case "gelu_integral":
            cdf = 0.5 * (1 + torch.erf(a * SQRT_HALF))
            return 0.5 * ((a.square() - 1) * cdf + a * DENSITY * torch.exp(-0.5 * a.square()))
        case "silu":
            return F.silu(a)
        case "gelu":
            return F.gelu(a)
        case _:
            return F.softplus(a)


def _slope(a: Tensor, phi: str, out: Tensor) -> Tensor:
    """phi'(a), written to ``out``."""
    match phi:
        case "gelu_integral":
            return torch.ops.aten.gelu.out(a, out=out)
        case "silu":
            x = _wide(a)
            sigmoid = torch.sigmoid(x)
            return out.copy_(sigmoid * (1 + x * (1 - sigmoid)))
        case "gelu":
            return torch.ops.aten.gelu_backward.grad_input(a.new_ones(()).expand_as(a), a, grad_input=out)
        case _:
            return torch.sigmoid(a, out=out)


def _curved(b: Tensor, a: Tensor, phi: str) -> Tensor:
    """phi''(a) b, written to ``b``."""
    if phi == "gelu_integral":
        return torch.ops.aten.gelu_backward.grad_input(b, a, grad_input=b)
    x = _wide(a)
    sigmoid = torch.sigmoid(x)
    match phi:
        case "silu":
            curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
        case "gelu":
            curvature = (2 - x.square()) * (DENSITY * torch.exp(-0.5 * x.square()))
        case _:
            curvature = sigmoid * (1 - sigmoid)
    return b.copy_(curvature.mul_(b))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- Eager implementation: all stages of CHUNK tokens, then the next ones, while the state is in the cache


class _Weights(NamedTuple):
    """The parameters of the potential."""

    w1: Tensor  # (hidden, D)
    b1: Tensor  # (hidden,), or (tokens, hidden) for one of each token
    w2: Tensor  # (hidden,)
    phi: str
    confinement: float  # c, stiffness of the spring

    @property
    def biased_by_token(self) -> bool:
        """Whether every token has a b1 of its own."""
        return self.b1.dim() > 1


class _Scheme(NamedTuple):
    """The stages, and the unit of the state."""

    kicks: Sequence[float]
    drifts: Sequence[float]
    scale: float

    @property
    def unit(self) -> float:
        """By how much a state exceeds its value."""
        return self.scale or 1.0


class _Field(NamedTuple):
    """What a force needs. ``inward`` is W1, ``outward`` is -w2 W1: w2 then costs no pass over the tokens."""

    inward: Tensor  # (hidden, D)
    bias: Tensor  # (hidden,) or (tokens, hidden)
    outward: Tensor  # (hidden, D)
    phi: str
    confinement: float

    def of(self, chunk: slice) -> _Field:
        """What the force needs of some tokens."""
        return self._replace(bias=self.bias[chunk]) if self.bias.dim() > 1 else self


class _Rows(NamedTuple):
    """Memory that every chunk and stage uses again."""

    x: Tensor  # (rows, D), q as an operand of the products
    a: Tensor  # (rows, hidden)
    slope: Tensor  # (rows, hidden), phi'(a)
    f: Tensor  # (rows, D), the force
    change: Tensor  # (rows, D), in the precision of the state
    whole: Tensor  # (rows, D), int32


class _AdjointRows(NamedTuple):
    """More of it for the backward pass."""

    y: Tensor  # (rows, D), the adjoint of p times the coefficient, as an operand
    b: Tensor  # (rows, hidden), W1 y, then phi''(a) W1 y
    g: Tensor  # (rows, D), the product of the Hessian with y


class _Sums(NamedTuple):
    """What the parameter gradients are made of, summed over tokens and stages."""

    slope: Tensor  # (hidden, D), of phi'(a) y
    curved: Tensor  # (hidden, D), of phi''(a) (W1 y) q
    bias: Tensor  # (hidden,), of phi''(a) (W1 y); (tokens, hidden), over stages only, if b1 has such rows
    product: Tensor  # (hidden, D), one term, where products are in half precision; else empty

    def of(self, chunk: slice) -> _Sums:
        """What some tokens add to."""
        return self._replace(bias=self.bias[chunk]) if self.bias.dim() > 1 else self


def _aligned(x: Tensor) -> Tensor:
    """Contiguous at a multiple of 64 bytes: libraries may choose the order of a sum by the alignment."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 64 else x


def _field(weights: _Weights) -> _Field:
    w1, b1, w2, phi, confinement = weights
    # Products in float16 are slow on the CPU.
    dtype = torch.float32 if w1.dtype == torch.float16 and w1.device.type == "cpu" else w1.dtype
    outward = -(_wide(w2).unsqueeze(1) * _wide(w1))
    inward, bias, outward = (_aligned(x.to(dtype)) for x in (w1, b1, outward))
    return _Field(inward, bias, outward, phi, confinement)


def _state_dtype(w1: Tensor) -> torch.dtype:
    """The precision outside the products."""
    return torch.float64 if w1.dtype == torch.float64 else torch.float32


def _rows(rows: int, field: _Field) -> _Rows:
    hidden, width = field.inward.shape
    make = field.inward.new_empty
    return _Rows(
        x=make(rows, width),
        a=make(rows, hidden),
        slope=make(rows, hidden),
        f=make(rows, width),
        change=make(rows, width, dtype=_state_dtype(field.inward)),
        whole=make(rows, width, dtype=torch.int32),
    )


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CHUNK):
        yield slice(start, min(start + CHUNK, tokens))


def _first(rows: Any, count: int) -> Any:
    return type(rows)(*(buffer[:count] for buffer in rows))


def _fixed_point(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rint(scale x) as int32, 0 where that does not fit, and the largest size, infinite if one does not."""
    whole = (x * scale).round_()
    size = whole.abs()
    fits = size < LIMIT
    size.masked_fill_(~fits, math.inf)
    return whole.masked_fill_(~fits, 0).to(torch.int32), size.amax() if x.numel() else size.sum()


def _activate(q: Tensor, field: _Field, unit: float, rows: _Rows) -> None:
    """Leave q in rows.x, W1 q + b1 in rows.a and phi' of it in rows.slope."""
    rows.x.copy_(q)
    if unit != 1:
        # A power of two: exact.
        rows.x.mul_(1 / unit)
    torch.addmm(field.bias, rows.x, field.inward.t(), out=rows.a)
    _slope(rows.a, field.phi, rows.slope)


def _activated_force(q: Tensor, field: _Field, unit: float, rows: _Rows) -> Tensor:
    """F(q) in rows.f, or with a spring in rows.change, after _activate."""
    f = torch.mm(rows.slope, field.outward, out=rows.f)
    if not field.confinement:
        return f
    return torch.mul(q, -field.confinement / unit, out=rows.change).add_(f)


def _add(state: Tensor, change: Tensor, rate: float, rows: _Rows) -> float:
    """state += rate change, rounded where the state is whole; returns its largest size then, else 0."""
    if state.is_floating_point():
        state.add_(rows.change.copy_(change), alpha=rate)
        return 0.0
    if change.dtype in (torch.bfloat16, torch.float16):
        change = rows.change.copy_(change)
    step = torch.mul(change, rate, out=rows.change).round_()
    low, high = step.aminmax()
    largest = max(-low.item(), high.item())
    fits = largest < LIMIT  # False for NaN, too
    if not fits:
        step.masked_fill_(~(step.abs() < LIMIT), 0)
    state.add_(rows.whole.copy_(step))
    if not fits:
        return math.inf
    low, high = state.aminmax()
    reached = max(-int(low), int(high))
    if max(largest, reached) < LIMIT / 2:
        return reached
    # It may have wrapped.
    return (state - rows.whole).double().add_(step).abs_().max().item()


def _run(q: Tensor, p: Tensor, field: _Field, scheme: _Scheme, rows: _Rows) -> float:
    """All stages of one chunk, in place; returns the largest size on the way where the state is whole."""
    peak = 0.0
    for kick, drift in zip(scheme.kicks, scheme.drifts, strict=True):
        if kick:
            _activate(q, field, scheme.unit, rows)
            force = _activated_force(q, field, scheme.unit, rows)
            peak = max(peak, _add(p, force, kick * scheme.unit, rows))
        if drift:
            peak = max(peak, _add(q, p, drift, rows))
    return peak


def _reversed(scheme: _Scheme) -> _Scheme:
    """The stages that undo stages: every half with the other sign, last one first."""
    kicks = (0.0, *(-kick for kick in reversed(scheme.kicks)))
    drifts = (*(-drift for drift in reversed(scheme.drifts)), 0.0)
    return _Scheme(kicks, drifts, scheme.scale)


def _flow_eager(q: Tensor, p: Tensor, weights: _Weights, scheme: _Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Final state (tokens, D), and the peak. A floating-point q becomes whole if the state is."""
    whole = scheme.scale > 0 and q.is_floating_point()
    end_q, end_p = (torch.empty_like(x, dtype=torch.int32 if whole else x.dtype) for x in (q, p))
    field = _field(weights)
    work = _rows(min(CHUNK, len(q)), field)
    peak = 0.0
    for chunk in _chunks(len(q)):
        rows = _first(work, chunk.stop - chunk.start)
        for end, start in ((end_q, q), (end_p, p)):
            if whole:
                fixed, largest = _fixed_point(start[chunk], scheme.scale)
                end[chunk] = fixed
                peak = max(peak, largest.item())
            else:
                end[chunk] = start[chunk]
        peak = max(peak, _run(end_q[chunk], end_p[chunk], field.of(chunk), scheme, rows))
    return end_q, end_p, q.new_tensor(peak, dtype=torch.float32)


def _adjoint_kick(
    grad_q: Tensor,
    grad_p: Tensor,
    kick: float,
    field: _Field,
    rows: _Rows,
    more: _AdjointRows,
    sums: _Sums | None,
) -> None:
    """After _activate: grad_q becomes that before the kick, and the sums take in what the kick adds."""
    more.y.copy_(torch.mul(grad_p, kick, out=rows.change))
    torch.mm(more.y, field.inward.t(), out=more.b)
    _curved(more.b, rows.a, field.phi)
    grad_q.add_(rows.change.copy_(torch.mm(more.b, field.outward, out=more.g)))
    if field.confinement:
        grad_q.add_(grad_p, alpha=-kick * field.confinement)
    if sums is not None:
        for total, left, right in ((sums.slope, rows.slope, more.y), (sums.curved, more.b, rows.x)):
            if total.dtype == left.dtype:
                total.addmm_(left.t(), right)
            else:
                total.add_(torch.mm(left.t(), right, out=sums.product))
        sums.bias.add_(more.b if sums.bias.dim() > 1 else more.b.sum(0, dtype=sums.bias.dtype))


def _flow_backward_eager(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    weights: _Weights,
    scheme: _Scheme,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """The initial q and p, and the gradients of q, p, w1, b1 and w2, the last three empty if not wanted."""
    grad_q, grad_p, start_q, start_p = grad_q.clone(), grad_p.clone(), end_q.clone(), end_p.clone()
    field = _field(weights)
    count, (hidden, width) = min(CHUNK, len(end_q)), weights.w1.shape
    work = _rows(count, field)
    make = field.inward.new_empty
    more_work = _AdjointRows(make(count, width), make(count, hidden), make(count, width))
    sums = _sums(field) if parameters else None
    for chunk in _chunks(len(end_q)):
        rows, more = (_first(buffers, chunk.stop - chunk.start) for buffers in (work, more_work))
        q, p = start_q[chunk], start_p[chunk]
        adjoint_q, adjoint_p = grad_q[chunk], grad_p[chunk]
        here, totals = field.of(chunk), sums.of(chunk) if sums else None
        for stage in reversed(range(len(scheme.kicks))):
            kick, drift = scheme.kicks[stage], scheme.drifts[stage]
            if drift:
                _add(q, p, -drift, rows)
                adjoint_p.add_(adjoint_q, alpha=drift)
            if kick:
                _activate(q, here, scheme.unit, rows)
                _adjoint_kick(adjoint_q, adjoint_p, kick, here, rows, more, totals)
                _add(p, _activated_force(q, here, scheme.unit, rows), -kick * scheme.unit, rows)
    return start_q, start_p, grad_q, grad_p, *_parameter_gradients(sums, weights)


def _sums(field: _Field) -> _Sums:
    hidden, width = field.inward.shape
    dtype = _state_dtype(field.inward)
    zeros = functools.partial(field.inward.new_zeros, dtype=dtype)
    product = field.inward.new_empty((hidden, width) if field.inward.dtype != dtype else 0)
    return _Sums(zeros((hidden, width)), zeros((hidden, width)), zeros(field.bias.shape), product)


def _parameter_gradients(sums: _Sums | None, weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    w1, b1, w2 = weights[:3]
    if sums is None:
        return w1.new_empty(0), b1.new_empty(0), w2.new_empty(0)
    minus_w2 = -_wide(w2)
    # The sum over tokens of phi'(a) (W1 y) is the row of W1 times the row of sums.slope.
    grad_w2 = -(_wide(w1) * sums.slope).sum(1)
    grad_b1 = sums.bias.mul_(minus_w2)
    grad_w1 = sums.slope.add_(sums.curved).mul_(minus_w2.unsqueeze(1))
    return grad_w1.to(w1.dtype), grad_b1.to(b1.dtype), grad_w2.to(w2.dtype)


# ---- Triton code
#
# All kernels hold whole rows of a force or gradient, so BLOCK_D is D rounded up to a power of two. Where
# BLOCK_K is less, the products over D run in pieces of BLOCK_K, whose operands are read again (from caches):
# those of a whole row do not fit on chip when D is large or the dtype is float32.


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


# ---- Triton wrappers


def _operands(weights: _Weights) -> _Weights:
    """The weights as the kernels read them."""
    w1, b1, w2 = weights[:3]
    b1 = b1 if weights.biased_by_token else b1.float()
    return weights._replace(w1=w1.contiguous(), b1=b1.contiguous(), w2=w2.float().contiguous())


def _precision(w1: Tensor) -> str:
    """How float32 is multiplied: by three products in TF32, about as accurate as one in float32.

    NVIDIA's tensor cores have no float32. Where rows are wide the operands of the three do not fit on chip.
    """
    return "tf32x3" if target_name(w1).startswith("sm_") and w1.shape[1] <= 512 else "ieee"


def _constants(weights: _Weights, scheme: _Scheme) -> dict[str, Any]:
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
    q: Tensor, p: Tensor, weights: _Weights, scheme: _Scheme, stages: range, options: Options
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


def _flow_triton(q: Tensor, p: Tensor, weights: _Weights, scheme: _Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """As _flow_eager."""
    largest = []
    if scheme.scale and q.is_floating_point():
        (q, largest_q), (p, largest_p) = (_fixed_point(x, scheme.scale) for x in (q, p))
        largest = [largest_q, largest_p]
    else:
        q, p = q.clone(), p.clone()
    options = _options("flow", weights.w1)
    peaks = _launch_stages(q, p, _operands(weights), scheme, range(len(scheme.kicks)), options)
    return q, p, torch.stack([peaks.amax(), *largest]).amax()


class _Partial(NamedTuple):
    """Parameter gradients by shares of the tokens."""

    w1: Tensor  # (splits, hidden, D)
    b1: Tensor  # (splits, hidden), or (1, tokens, hidden) of rows for each token
    w2: Tensor  # (splits, hidden)


def _partial(tokens: int, weights: _Weights) -> _Partial:
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
    weights: _Weights,
    partial: _Partial | None,
    kick: float,
    scheme: _Scheme,
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


def _summed(partial: _Partial | None, weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    w1, b1, w2 = weights[:3]
    if partial is None:
        return w1.new_empty(0), b1.new_empty(0), w2.new_empty(0)
    return partial.w1.sum(0).to(w1.dtype), partial.b1.sum(0).to(b1.dtype), partial.w2.sum(0).to(w2.dtype)


def _flow_backward_triton(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    weights: _Weights,
    scheme: _Scheme,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """As _flow_backward_eager: the flow kernel undoes a stage, then its adjoint is taken."""
    grad_q, grad_p, q, p = grad_q.clone(), grad_p.clone(), end_q.clone(), end_p.clone()
    operands = _operands(weights)
    options = _options("flow", weights.w1)
    partial = _partial(len(q), weights) if parameters else None
    # Its stage k undoes the drift of the kth last stage, and before that the kick of the stage after it.
    undo = _reversed(scheme)
    for back in range(len(undo.kicks)):
        if undo.kicks[back] or undo.drifts[back]:
            _launch_stages(q, p, operands, undo, range(back, back + 1), options)
        if back == len(scheme.kicks):
            break
        kick, drift = scheme.kicks[-1 - back], scheme.drifts[-1 - back]
        if drift:
            grad_p.add_(grad_q, alpha=drift)
        if kick:
            _launch_adjoint(q, grad_q, grad_p, operands, partial, kick, scheme)
    return q, p, grad_q, grad_p, *_summed(partial, weights)


# ---- Operations


@operator
def _symplectic_flow(
    q: Tensor,
    p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: list[float],
    drifts: list[float],
    phi: str,
    confinement: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Final state as it is held, int32 if scale > 0, and the peak. q and p are floating point or so held."""
    run = _flow_triton if use_triton(w1) else _flow_eager
    weights, scheme = _weights(w1, b1, w2, phi, confinement), _Scheme(kicks, drifts, scale)
    with torch.autocast(q.device.type, enabled=False):
        end_q, end_p, peak = run(_flat(q), _flat(p), weights, scheme)
        if not scale and q.numel():
            peak = torch.maximum(end_q.abs().amax(), end_p.abs().amax()).float()
    return end_q.view(q.shape), end_p.view(p.shape), peak


@_symplectic_flow.register_fake
def _(
    q: Tensor,
    p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: list[float],
    drifts: list[float],
    phi: str,
    confinement: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    end_q, end_p = (x.new_empty(x.shape, dtype=torch.int32 if scale else x.dtype) for x in (q, p))
    return end_q, end_p, w1.new_empty((), dtype=torch.float32)


@operator
def _symplectic_flow_backward(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: list[float],
    drifts: list[float],
    phi: str,
    confinement: float,
    scale: float,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The initial q and p, as held, and the gradients of q, p, w1, b1 and w2 from those of the final state.

    The gradients of the parameters are empty if not wanted.
    """
    run = _flow_backward_triton if use_triton(w1) else _flow_backward_eager
    weights, scheme = _weights(w1, b1, w2, phi, confinement), _Scheme(kicks, drifts, scale)
    with torch.autocast(grad_q.device.type, enabled=False):
        *states, grad_w1, grad_b1, grad_w2 = run(
            _flat(grad_q), _flat(grad_p), _flat(end_q), _flat(end_p), weights, scheme, parameters
        )
    start_q, start_p, grad_q, grad_p = (x.view(grad_q.shape) for x in states)
    return start_q, start_p, grad_q, grad_p, grad_w1, grad_b1.view(b1.shape if parameters else 0), grad_w2


@_symplectic_flow_backward.register_fake
def _(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: list[float],
    drifts: list[float],
    phi: str,
    confinement: float,
    scale: float,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    start_q, start_p, grad_q, grad_p = (x.new_empty(x.shape) for x in (end_q, end_p, grad_q, grad_p))
    grad_w1, grad_b1, grad_w2 = (x.new_empty(x.shape if parameters else 0) for x in (w1, b1, w2))
    return start_q, start_p, grad_q, grad_p, grad_w1, grad_b1, grad_w2


def _flat(x: Tensor) -> Tensor:
    """(tokens, D)."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _weights(w1: Tensor, b1: Tensor, w2: Tensor, phi: str, confinement: float) -> _Weights:
    return _Weights(w1, _flat(b1) if b1.dim() > 1 else b1, w2, phi, confinement)


def _check(q: Tensor, p: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, phi: str) -> None:
    if phi not in POTENTIALS:
        raise ValueError(f"phi={phi} is not known; choose one of {', '.join(POTENTIALS)}")
    if w1.ndim != 2 or b1.shape[-1:] != w1.shape[:1] or w2.shape != w1.shape[:1]:
        shapes = f"{tuple(w1.shape)}, {tuple(b1.shape)}, {tuple(w2.shape)}"
        raise ValueError(f"w1, b1, w2 must be (hidden, D), (hidden,), (hidden,), not {shapes}")
    if q.shape != p.shape or q.shape[-1:] != w1.shape[1:]:
        raise ValueError(f"q {tuple(q.shape)} and p {tuple(p.shape)} must both be (..., {w1.shape[1]})")
    if b1.ndim > 1 and b1.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"b1 {tuple(b1.shape)} must have a row for each token of q {tuple(q.shape)}")
    if q.dtype != p.dtype:
        raise TypeError(f"q is {q.dtype}, p is {p.dtype}")
    weights = {w1.dtype, b1.dtype, w2.dtype}
    in_double = weights == {torch.float64}
    in_single = weights <= {torch.float32, torch.bfloat16, torch.float16}
    if not ((in_double and q.dtype != torch.float32) or (in_single and q.dtype != torch.float64)):
        raise TypeError(f"weights in {', '.join(map(str, weights))} do not go with a state in {q.dtype}")


def _check_stages(kicks: Sequence[float], drifts: Sequence[float], scale: float) -> None:
    if len(kicks) != len(drifts):
        raise ValueError(f"{len(kicks)} kicks but {len(drifts)} drifts")
    if scale and (scale < 0 or math.frexp(scale)[0] != 0.5):
        raise ValueError(f"scale={scale} must be 0 or a power of two")


def potential(
    q: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    phi: str = "gelu_integral",
    confinement: float = 0.0,
) -> Tensor:
    """V(q) = w2 . phi(W1 q + b1) + c |q|^2 / 2 by plain PyTorch, in the dtype of q.

    Args:
        q: (..., D).
        w1: (hidden, D).
        b1: (hidden,), or (..., hidden) for one of each token.
        w2: (hidden,).
        phi: ``gelu_integral``, whose derivative is GELU, ``silu``, ``gelu`` or ``softplus``.
        confinement: c.

    Returns:
        (...,).
    """
    _check(q, q, w1, b1, w2, phi)
    hidden = _phi(F.linear(q, w1.to(q.dtype)) + b1.to(q.dtype), phi) @ w2.to(q.dtype)
    return hidden + confinement / 2 * q.square().sum(-1) if confinement else hidden


def _check_state(dtype: torch.dtype, *allowed: torch.dtype) -> None:
    if dtype not in allowed:
        raise TypeError(f"the state must be {' or '.join(map(str, allowed))}, not {dtype}")


class _UndoneFlow(torch.autograd.Function):
    """See ``undone_flow``."""

    @staticmethod
    def forward(
        ctx: Any,
        advance: Advance,
        undo: Undo,
        replace: Replace | None,
        scale: float,
        q: Tensor,
        p: Tensor,
        *coefficients: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        end_q, end_p, peak = advance(q, p, *coefficients)
        ctx.undo, ctx.replace = undo, replace
        ctx.save_for_backward(end_q, end_p, *coefficients, *((q, p) if replace else ()))
        ctx.mark_non_differentiable(peak)
        if scale:
            # NaN of an overflowed flow: nobody goes on with what is worthless without noticing.
            unit = torch.full_like(peak, 1 / scale).masked_fill(~(peak < LIMIT), math.nan)
            end_q, end_p = (x.to(q.dtype).mul_(unit) for x in (end_q, end_p))
        return end_q, end_p, peak

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_p: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a flow that is undone has no second derivative; stage.gradient=backprop has")
        end_q, end_p, *saved = ctx.saved_tensors
        given = [saved.pop(), saved.pop()][::-1] if ctx.replace else []
        wanted = any(ctx.needs_input_grad[6:])
        start_q, start_p, *found = ctx.undo(grad_q, grad_p, end_q, end_p, *saved, parameters=wanted)
        gradients: Sequence[Tensor | None] = found
        if given:
            gradients = ctx.replace(start_q, start_p, grad_q, grad_p, *given, *saved) or gradients
        if not wanted:
            gradients = (*gradients[:2], *[None] * len(saved))
        return None, None, None, None, *gradients


def undone_flow(
    advance: Advance,
    undo: Undo,
    q: Tensor,
    p: Tensor,
    coefficients: Sequence[Tensor],
    scale: float,
    replace: Replace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A flow of which only the final state is kept, because its backward pass undoes it.

    Args:
        advance: called with q, p and the coefficients; returns the final state as it is held and the peak, as
            the function ``advance`` here.
        undo: called with the gradients of the final q and p, these as they were held, the coefficients and
            ``parameters``, whether their gradients are wanted; returns as the function ``undo`` here.
        q: (..., D), float32 or float64.
        p: as q.
        coefficients: all that the flow is differentiated by beside q and p.
        scale: units of the fixed-point state, a power of two; 0 for a floating-point state.
        replace: where it is given the initial state is kept, too. Called with the rebuilt q and p, the
            gradients of the final ones, the q and p that were given and the coefficients, it returns
            gradients in place of those of ``undo``, or None.

    Returns:
        q and p after the flow, NaN where a fixed-point state overflowed, and the peak without gradient. The
        gradient has no derivative.
    """
    return _UndoneFlow.apply(advance, undo, replace, scale, q, p, *coefficients)


def symplectic_flow(
    q: Tensor,
    p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: Sequence[float],
    drifts: Sequence[float],
    *,
    phi: str = "gelu_integral",
    confinement: float = 0.0,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all stages of a splitting scheme; the backward pass undoes them, so nothing on the way is kept.

    For the backward pass the final state is kept, 8 bytes a channel and token, and references to the weights.
    Products: 2 a force forward; backward 6 on the CPU, 9 in the Triton code.

    Args:
        q: (..., D), float32 (float64 in the eager implementation).
        p: as q.
        w1: (hidden, D), float32, bfloat16 or float16 (float64 if q is); the products run in its dtype.
        b1: (hidden,), or (..., hidden) for one of each token, as w1.
        w2: (hidden,), as w1.
        kicks: coefficients of the kicks.
        drifts: coefficients of the drifts, as many.
        phi: as for ``potential``.
        confinement: c, stiffness of the spring.
        scale: units of the fixed-point state, a power of two; 0 for a floating-point state.

    Returns:
        q and p after the last stage, and the peak, a float32 scalar without gradient: the largest size of
        any q or p met, in units of 1 / scale. From 2^31 on the state has overflowed and the results are
        worthless; it is infinite where a force was not finite. With scale 0 it is the largest size of the
        results, NaN if any of them is.

    Raises:
        ValueError: shapes or coefficients do not fit, phi is not known, or scale is not a power of two.
        TypeError: dtypes do not fit.
    """
    _check_state(q.dtype, torch.float32, torch.float64)
    how: dict[str, Any] = {
        "kicks": kicks, "drifts": drifts, "phi": phi, "confinement": confinement, "scale": scale
    }  # fmt: skip
    return undone_flow(
        functools.partial(advance, **how), functools.partial(undo, **how), q, p, (w1, b1, w2), scale
    )


@torch.no_grad()
def advance(
    q: Tensor,
    p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: Sequence[float],
    drifts: Sequence[float],
    *,
    phi: str = "gelu_integral",
    confinement: float = 0.0,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As symplectic_flow without gradients, but the state is returned as it is held: int32 if scale > 0.

    q and p may be such a state, too.
    """
    _check(q, p, w1, b1, w2, phi)
    _check_stages(kicks, drifts, scale)
    _check_state(q.dtype, torch.float32, torch.float64, *([torch.int32] if scale else []))
    return _symplectic_flow(q, p, w1, b1, w2, list(kicks), list(drifts), phi, confinement, scale)


@torch.no_grad()
def undo(
    grad_q: Tensor,
    grad_p: Tensor,
    end_q: Tensor,
    end_p: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kicks: Sequence[float],
    drifts: Sequence[float],
    *,
    phi: str = "gelu_integral",
    confinement: float = 0.0,
    scale: float = 0.0,
    parameters: bool = True,
) -> tuple[Tensor, ...]:
    """The backward pass of a flow from its final state: what that was before all stages, and the gradients.

    Args:
        grad_q: gradient of the final q, float32 (float64 in the eager implementation).
        grad_p: gradient of the final p.
        end_q: final q as ``advance`` returns it, int32 if scale > 0.
        end_p: final p.
        parameters: whether the gradients of the parameters are wanted.

    Returns:
        The initial q and p, and the gradients of q, p, w1, b1 and w2, the last three empty if not wanted.
    """
    _check_stages(kicks, drifts, scale)
    _check_state(end_q.dtype, *((torch.int32,) if scale else (torch.float32, torch.float64)))
    _check(grad_q, grad_p, w1, b1, w2, phi)
    stages = list(kicks), list(drifts)
    return _symplectic_flow_backward(
        grad_q, grad_p, end_q, end_p, w1, b1, w2, *stages, phi, confinement, scale, parameters
    )


def fixed_point(x: Tensor, scale: float) -> Tensor:
    """rint(scale x) as int32, the first step of a flow with this scale; 0 where that does not fit."""
    return _fixed_point(x, scale)[0]


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, with tensors on the default device."""

    tokens = 4096

    def make_weights(dtype: torch.dtype, width: int, phi: str, by_token: bool = False) -> _Weights:
        make = functools.partial(torch.empty, dtype=dtype)
        # As many hidden units as stage 2 has are no multiple of 16.
        hidden = 4 * width - by_token
        b1 = make(tokens, hidden) if by_token else make(hidden)
        return _Weights(make(hidden, width), b1, make(hidden), phi, 0.0)

    def flow(
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
        scheme = _Scheme((1.0,), (0.0,), scale)
        _flow_triton(end, end, weights, scheme)
        if backward:
            _flow_backward_triton(grad, grad, end, end, weights, scheme, True)

    cases: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in (64, 128, 256, 512, 1024):
            cases[f"{name} {width} exact"] = functools.partial(flow, dtype, width)
            cases[f"{name} {width} exact, b1 by token"] = functools.partial(flow, dtype, width, by_token=True)
    for phi in ("silu", "gelu"):
        cases[f"bfloat16 64 {phi}"] = functools.partial(flow, torch.bfloat16, 64, phi)
    cases["bfloat16 128 float"] = functools.partial(flow, torch.bfloat16, 128, scale=0.0, backward=False)
    cases["float32 512 float"] = functools.partial(flow, torch.float32, 512, scale=0.0, by_token=True)
    return cases
