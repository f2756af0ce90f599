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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import use_triton
from kernels.operator import operator
from kernels.symplectic import eager, triton_code
from kernels.symplectic.plain import phi_of
from kernels.symplectic.scheme import LIMIT, POTENTIALS, Scheme, Weights, to_fixed_point

__all__ = [
    "LIMIT",
    "POTENTIALS",
    "advance",
    "fixed_point",
    "potential",
    "symplectic_flow",
    "undo",
    "undone_flow",
]

# Of ``undone_flow``.
Advance = Callable[..., tuple[Tensor, Tensor, Tensor]]
Undo = Callable[..., Sequence[Tensor]]
Replace = Callable[..., Sequence[Tensor | None] | None]


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
    code = triton_code if use_triton(w1) else eager
    weights, scheme = _weights(w1, b1, w2, phi, confinement), Scheme(kicks, drifts, scale)
    with torch.autocast(q.device.type, enabled=False):
        end_q, end_p, peak = code.flow(_flat(q), _flat(p), weights, scheme)
        if not scale and q.numel():
            peak = torch.maximum(end_q.abs().amax(), end_p.abs().amax()).float()
    return end_q.view(q.shape), end_p.view(p.shape), peak


@_symplectic_flow.register_fake
def _(q: Tensor, p: Tensor, w1: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    scale = settings[-1]
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
    rebuilt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The initial q and p, as held, and the gradients of q, p, w1, b1 and w2 from those of the final state.

    The initial state and the gradients of the parameters are empty if not wanted.
    """
    code = triton_code if use_triton(w1) else eager
    weights, scheme = _weights(w1, b1, w2, phi, confinement), Scheme(kicks, drifts, scale)
    with torch.autocast(grad_q.device.type, enabled=False):
        start_q, start_p, *grads, grad_w1, grad_b1, grad_w2 = code.flow_backward(
            _flat(grad_q), _flat(grad_p), _flat(end_q), _flat(end_p), weights, scheme, parameters, rebuilt
        )
    start_q, start_p = (x.view(end_q.shape if rebuilt else 0) for x in (start_q, start_p))
    grad_q, grad_p = (x.view(grad_q.shape) for x in grads)
    return start_q, start_p, grad_q, grad_p, grad_w1, grad_b1.view(b1.shape if parameters else 0), grad_w2


@_symplectic_flow_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    grad_q, grad_p, end_q, end_p, w1, b1, w2, *_, parameters, rebuilt = arguments
    start_q, start_p = (x.new_empty(x.shape if rebuilt else 0) for x in (end_q, end_p))
    grad_q, grad_p = (x.new_empty(x.shape) for x in (grad_q, grad_p))
    grad_w1, grad_b1, grad_w2 = (x.new_empty(x.shape if parameters else 0) for x in (w1, b1, w2))
    return start_q, start_p, grad_q, grad_p, grad_w1, grad_b1, grad_w2


def _flat(x: Tensor) -> Tensor:
    """(tokens, D), in whatever layout."""
    return x.reshape(-1, x.shape[-1])


def _weights(w1: Tensor, b1: Tensor, w2: Tensor, phi: str, confinement: float) -> Weights:
    return Weights(w1, _flat(b1).contiguous() if b1.dim() > 1 else b1, w2, phi, confinement)


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
    hidden = phi_of(F.linear(q, w1.to(q.dtype)) + b1.to(q.dtype), phi) @ w2.to(q.dtype)
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
        start_q, start_p, *found = ctx.undo(
            grad_q, grad_p, end_q, end_p, *saved, parameters=wanted, rebuilt=ctx.replace is not None
        )
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
        undo: called with the gradients of the final q and p, these as they were held, the coefficients,
            ``parameters``, whether gradients of these are wanted and not left out, and ``rebuilt``, whether
            the initial state is; returns as the function ``undo`` here.
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
    Products: 2 a force forward; backward 6 on the CPU, 9 in the Triton code, one or two less in all because
    the first kick is not undone.

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
    rebuilt: bool = True,
) -> tuple[Tensor, ...]:
    """The backward pass of a flow from its final state: what that was before all stages, and the gradients.

    Args:
        grad_q: gradient of the final q, float32 (float64 in the eager implementation).
        grad_p: gradient of the final p.
        end_q: final q as ``advance`` returns it, int32 if scale > 0.
        end_p: final p.
        parameters: whether the gradients of the parameters are wanted.
        rebuilt: whether the initial state is; without it nothing before the first kick is undone, nor that.

    Returns:
        The initial q and p, and the gradients of q, p, w1, b1 and w2; empty are those that are not wanted.
    """
    _check_stages(kicks, drifts, scale)
    _check_state(end_q.dtype, *((torch.int32,) if scale else (torch.float32, torch.float64)))
    _check(grad_q, grad_p, w1, b1, w2, phi)
    stages = list(kicks), list(drifts)
    return _symplectic_flow_backward(
        grad_q, grad_p, end_q, end_p, w1, b1, w2, *stages, phi, confinement, scale, parameters, rebuilt
    )


def fixed_point(x: Tensor, scale: float) -> Tensor:
    """rint(scale x) as int32, the first step of a flow with this scale; 0 where that does not fit."""
    return to_fixed_point(x, scale)[0]
