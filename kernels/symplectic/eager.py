"""Flows by PyTorch: all stages of CHUNK tokens, then the next ones, while the state is in the cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.planar import precise, upcast
from kernels.products import addmm, mm
from kernels.symplectic.plain import DENSITY
from kernels.symplectic.scheme import LIMIT, Scheme, Weights, copied, first_kick

# Tokens whose hidden activations the eager code holds at a time. Few are slow, because libraries pack the
# weights anew for each product.
CHUNK = 2048


def _slope(a: Tensor, phi: str, out: Tensor) -> Tensor:
    """phi'(a), written to ``out``."""
    match phi:
        case "gelu_integral":
            return torch.ops.aten.gelu.out(a, out=out)
        case "silu":
            x = upcast(a)
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
    x = upcast(a)
    sigmoid = torch.sigmoid(x)
    match phi:
        case "silu":
            curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
        case "gelu":
            curvature = (2 - x.square()) * (DENSITY * torch.exp(-0.5 * x.square()))
        case _:
            curvature = sigmoid * (1 - sigmoid)
    return b.copy_(curvature.mul_(b))


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


def _field(weights: Weights) -> _Field:
    w1, b1, w2, phi, confinement = weights
    # Products in float16 are slow on the CPU.
    dtype = torch.float32 if w1.dtype == torch.float16 and w1.device.type == "cpu" else w1.dtype
    outward = -(upcast(w2).unsqueeze(1) * upcast(w1))
    inward, bias, outward = (_aligned(x.to(dtype)) for x in (w1, b1, outward))
    return _Field(inward, bias, outward, phi, confinement)


def _rows(rows: int, field: _Field, backward: bool) -> _Rows:
    hidden, width = field.inward.shape
    make = field.inward.new_empty
    a = make(rows, hidden)
    return _Rows(
        x=make(rows, width),
        a=a,
        # Without a backward pass nobody reads a again.
        slope=make(rows, hidden) if backward else a,
        f=make(rows, width),
        change=make(rows, width, dtype=precise(field.inward)),
        whole=make(rows, width, dtype=torch.int32),
    )


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CHUNK):
        yield slice(start, min(start + CHUNK, tokens))


def _first(rows: Any, count: int) -> Any:
    return type(rows)(*(buffer[:count] for buffer in rows))


def _activate(q: Tensor, field: _Field, unit: float, rows: _Rows) -> None:
    """Leave q in rows.x, W1 q + b1 in rows.a and phi' of it in rows.slope."""
    rows.x.copy_(q)
    if unit != 1:
        # A power of two: exact.
        rows.x.mul_(1 / unit)
    addmm(field.bias, rows.x, field.inward.t(), out=rows.a)
    _slope(rows.a, field.phi, rows.slope)


def _activated_force(q: Tensor, field: _Field, unit: float, rows: _Rows) -> Tensor:
    """F(q) in rows.f, or with a spring in rows.change, after _activate."""
    f = mm(rows.slope, field.outward, out=rows.f)
    if not field.confinement:
        return f
    return torch.mul(q, -field.confinement / unit, out=rows.change).add_(f)


def _round_into(whole: Tensor, x: Tensor) -> float:
    """Round x in place and copy it to int32, 0 where that does not fit; its largest size, infinite then."""
    low, high = x.round_().aminmax()
    largest = max(-low.item(), high.item())
    fits = largest < LIMIT  # False for NaN, too
    if not fits:
        x.masked_fill_(~(x.abs() < LIMIT), 0)
    whole.copy_(x)
    return largest if fits else math.inf


def _add(state: Tensor, change: Tensor, rate: float, rows: _Rows) -> float:
    """state += rate change, rounded where the state is whole; returns its largest size then, else 0."""
    if state.is_floating_point():
        state.add_(rows.change.copy_(change), alpha=rate)
        return 0.0
    if change.dtype in (torch.bfloat16, torch.float16):
        change = rows.change.copy_(change)
    step = torch.mul(change, rate, out=rows.change)
    largest = _round_into(rows.whole, step)
    state.add_(rows.whole)
    if largest == math.inf:
        return largest
    low, high = state.aminmax()
    reached = max(-int(low), int(high))
    if max(largest, reached) < LIMIT / 2:
        return reached
    # It may have wrapped.
    return (state - rows.whole).double().add_(step).abs_().max().item()


def _run(q: Tensor, p: Tensor, field: _Field, scheme: Scheme, rows: _Rows) -> float:
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


def flow(q: Tensor, p: Tensor, weights: Weights, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Final state (tokens, D), and the peak. A floating-point q becomes whole if the state is."""
    whole = scheme.scale > 0 and q.is_floating_point()
    end_q, end_p = (x.new_empty(x.shape, dtype=torch.int32 if whole else x.dtype) for x in (q, p))
    field = _field(weights)
    work = _rows(min(CHUNK, len(q)), field, backward=False)
    peak = 0.0
    for chunk in _chunks(len(q)):
        rows = _first(work, chunk.stop - chunk.start)
        for end, start in ((end_q, q), (end_p, p)):
            if whole:
                scaled = torch.mul(start[chunk], scheme.scale, out=rows.change)
                peak = max(peak, _round_into(end[chunk], scaled))
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
    mm(more.y, field.inward.t(), out=more.b)
    _curved(more.b, rows.a, field.phi)
    grad_q.add_(rows.change.copy_(mm(more.b, field.outward, out=more.g)))
    if field.confinement:
        grad_q.add_(grad_p, alpha=-kick * field.confinement)
    if sums is not None:
        for total, left, right in ((sums.slope, rows.slope, more.y), (sums.curved, more.b, rows.x)):
            if total.dtype == left.dtype:
                total.addmm_(left.t(), right)
            else:
                total.add_(mm(left.t(), right, out=sums.product))
        sums.bias.add_(more.b if sums.bias.dim() > 1 else more.b.sum(0, dtype=sums.bias.dtype))


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
    """The initial q and p, and the gradients of q, p, w1, b1 and w2; empty are what is not wanted."""
    grad_q, grad_p = copied(grad_q), copied(grad_p)
    # A whole state is rebuilt only where somebody wants it.
    start_q, start_p = (copied(x) if rebuilt else x.new_empty(0) for x in (end_q, end_p))
    field = _field(weights)
    count, (hidden, width) = min(CHUNK, len(end_q)), weights.w1.shape
    work = _rows(count, field, backward=True)
    make = field.inward.new_empty
    more_work = _AdjointRows(make(count, width), make(count, hidden), make(count, width))
    sums = _sums(field) if parameters else None
    first = -1 if rebuilt else first_kick(scheme)
    for chunk in _chunks(len(end_q)):
        rows, more = (_first(buffers, chunk.stop - chunk.start) for buffers in (work, more_work))
        q, p = (
            start[chunk] if rebuilt else copied(end[chunk])
            for start, end in ((start_q, end_q), (start_p, end_p))
        )
        adjoint_q, adjoint_p = grad_q[chunk], grad_p[chunk]
        here, totals = field.of(chunk), sums.of(chunk) if sums else None
        for stage in reversed(range(len(scheme.kicks))):
            kick, drift = scheme.kicks[stage], scheme.drifts[stage]
            if drift:
                if stage >= first:
                    _add(q, p, -drift, rows)
                adjoint_p.add_(adjoint_q, alpha=drift)
            if kick:
                _activate(q, here, scheme.unit, rows)
                _adjoint_kick(adjoint_q, adjoint_p, kick, here, rows, more, totals)
                if stage > first:
                    _add(p, _activated_force(q, here, scheme.unit, rows), -kick * scheme.unit, rows)
    return start_q, start_p, grad_q, grad_p, *_parameter_gradients(sums, weights)


def _sums(field: _Field) -> _Sums:
    hidden, width = field.inward.shape
    dtype = precise(field.inward)
    zeros = functools.partial(field.inward.new_zeros, dtype=dtype)
    product = field.inward.new_empty((hidden, width) if field.inward.dtype != dtype else 0)
    return _Sums(zeros((hidden, width)), zeros((hidden, width)), zeros(field.bias.shape), product)


def _parameter_gradients(sums: _Sums | None, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    w1, b1, w2 = weights[:3]
    if sums is None:
        return w1.new_empty(0), b1.new_empty(0), w2.new_empty(0)
    minus_w2 = -upcast(w2)
    # The sum over tokens of phi'(a) (W1 y) is the row of W1 times the row of sums.slope.
    grad_w2 = -(upcast(w1) * sums.slope).sum(1)
    grad_b1 = sums.bias.mul_(minus_w2)
    grad_w1 = sums.slope.add_(sums.curved).mul_(minus_w2.unsqueeze(1))
    return grad_w1.to(w1.dtype), grad_b1.to(b1.dtype), grad_w2.to(w2.dtype)
