"""Potentials V(q) of one token, with their forces in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels import symplectic
from kernels.planar import precise
from kernels.products import linear, matmul
from kernels.symplectic.plain import slope_of
from muse.dynamics.integrators import Stages

# The lowest value of phi, from which V is measured: energies are then no differences of large numbers, and
# relative drifts mean something. Forces do not depend on it.
LOWEST = {"gelu_integral": -0.25, "silu": -0.27846454276107379, "gelu": -0.16997120747990369, "softplus": 0.0}
# Tokens that have their rows of b1 at a time on a CPU.
CHUNK = 1024
FORCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Potential(nn.Module):
    """V(q) and F(q) = -grad V(q) of each token by itself.

    A potential defines ``value`` and ``force`` as functions of q and its coefficients: the parameters and, if
    it has one, the context, given as arguments so that a flow that is undone can be differentiated by them.
    The context is what V depends on of a token beside q; it is frozen for the whole flow, so that H is the
    same function of (q, p) at every time. ``advance`` and ``undo`` run any potential in plain PyTorch; one
    that has a kernel overrides them.
    """

    def coefficients(self) -> tuple[Tensor, ...]:
        """The parameters, in the order in which the functions below take them."""
        return tuple(self.parameters())

    def context(self, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        """Further coefficients, each (..., C): what V depends on of a token whose flow starts at (q, p)."""
        return ()

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        """V(q) (...,) of q (..., D), in the dtype of q."""
        raise NotImplementedError

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        """F(q) (..., D) by plain PyTorch operations, in the dtype of q."""
        raise NotImplementedError

    def field(self, *coefficients: Tensor) -> Callable[[Tensor], Tensor]:
        """``force`` of these coefficients, for many q: what depends on no q can be worked out here, once."""
        return lambda q: self.force(q, *coefficients)

    def forward(self, q: Tensor, *context: Tensor) -> Tensor:
        return self.value(q, *self.coefficients(), *context)

    @torch.no_grad()
    def advance(
        self, q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...], stages: Stages, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after all stages, as ``kernels.symplectic.advance`` returns it.

        Returns:
            q and p, int32 in units of 1 / scale if scale > 0, and the largest size on the way in these units:
            from 2^31 on, infinite or NaN the state is worthless.
        """
        peak = torch.maximum(*(_size(x * scale if scale and x.is_floating_point() else x) for x in (q, p)))
        q, p = (_held(x, scale) for x in (q, p))
        force = self.field(*coefficients)
        for kick, drift in zip(stages.kicks, stages.drifts, strict=True):
            if kick:
                p, size = _moved(p, kick * (scale or 1) * force(_value(q, scale)))
                peak = torch.maximum(peak, size)
            if drift:
                q, size = _moved(q, drift * (p if not scale else p.double()))
                peak = torch.maximum(peak, size)
        return q, p, peak

    def undo(
        self,
        grad_q: Tensor,
        grad_p: Tensor,
        end_q: Tensor,
        end_p: Tensor,
        coefficients: tuple[Tensor, ...],
        stages: Stages,
        scale: float,
        parameters: bool = True,
        rebuilt: bool = True,
    ) -> tuple[Tensor, ...]:
        """The initial state as ``advance`` held it, and the gradients of q, p and the coefficients.

        Where ``parameters`` is false those of the coefficients may be empty, or left out; where ``rebuilt``
        is, the initial state may be empty.
        """
        q, p = end_q, end_p
        leaves = [x.detach().requires_grad_(parameters) for x in coefficients]
        wanted = leaves if parameters else []
        sums = [torch.zeros_like(x) for x in wanted]
        for kick, drift in reversed(list(zip(stages.kicks, stages.drifts, strict=True))):
            if drift:
                q, _ = _moved(q, -drift * (p if not scale else p.double()))
                grad_p = grad_p + drift * grad_q
            if kick:
                with torch.enable_grad():
                    at = _value(q, scale).detach().requires_grad_()
                    force = self.force(at, *leaves)
                    # A constant force depends on nothing.
                    changes: tuple[Tensor | None, ...] = (None,) * (1 + len(wanted))
                    if force.requires_grad:
                        changes = torch.autograd.grad(force, (at, *wanted), kick * grad_p, allow_unused=True)
                p, _ = _moved(p, -kick * (scale or 1) * force.detach())
                # None: the force does not depend on it.
                grad_q, *sums = (
                    total if x is None else total + x
                    for total, x in zip((grad_q, *sums), changes, strict=True)
                )
        return q, p, grad_q, grad_p, *sums


def _held(x: Tensor, scale: float) -> Tensor:
    return symplectic.fixed_point(x, scale) if scale and x.is_floating_point() else x


def _value(x: Tensor, scale: float) -> Tensor:
    return x.float() * (1 / scale) if scale else x


def _size(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def _moved(state: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The state after a change, rounded where the state is whole, and its largest size."""
    if state.is_floating_point():
        moved = state + change
        return moved, _size(moved)
    whole = change.round()
    fits = whole.abs() < symplectic.LIMIT
    reached = (state.double() + whole).masked_fill(~fits, math.inf)
    return state + whole.masked_fill(~fits, 0).to(torch.int32), _size(reached)


class MLPPotential(Potential):
    """V(q) = |w2| . (phi(W1 q + b1) - min phi) + c |q|^2 / 2: a force that is an MLP with tied weights, and a
    spring that pulls back.

    With weights of either sign V falls without bound along some directions, as -|q|^2, and the flow runs off
    exponentially within a few units of time. A negative weight adds nothing but a linear force to what
    positive ones can do: phi(a) + phi(-a) = (a^2 - 1) / 2 for the integral of GELU.

    With a context the hidden units see (q0, p0), where the token starts its flow, through a map of their own:
    b1 + U (q0, p0) takes the place of b1. Without one all that they see they must see through W1, whose
    transpose leads out again.

    Without the spring V is flat in the directions in which all hidden units are off. After training, tokens
    leave along them and cross the bends of hidden units within a step of 0.1: energies drift by 9e-5 instead
    of 6e-7.

    Args:
        features: D, channels of q.
        hidden: hidden units.
        phi: ``gelu_integral``, whose derivative is GELU, ``silu``, ``gelu`` or ``softplus``.
        force_precision: dtype of the products, ``fp32``, ``bf16`` or ``fp16``; float64 weights keep theirs.
        curvature: mean curvature tr V'' / D of the MLP at the start.
        confinement: c, stiffness of the spring.
        with_context: whether V depends on (q0, p0).
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        phi: str = "gelu_integral",
        force_precision: str = "fp32",
        curvature: float = 0.65,
        confinement: float = 0.0,
        with_context: bool = False,
    ) -> None:
        super().__init__()
        self.phi, self.force_dtype = phi, FORCE_DTYPES[force_precision]
        self.confinement, self.with_context = confinement, with_context
        self.w1 = nn.Parameter(torch.empty(hidden, features).normal_(std=features**-0.5))
        self.b1 = nn.Parameter(torch.zeros(hidden))
        # A row of W1 has length 1, and phi'' is 1/2 on average: tr V'' = sum w2 / 2.
        w2 = torch.empty(hidden).normal_().abs()
        self.w2 = nn.Parameter(w2 * (2 * curvature * features / w2.sum()))
        if with_context:
            self.context_weight = nn.Parameter(torch.empty(hidden, 2 * features).normal_(std=features**-0.5))

    def context(self, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat((q, p), -1),) if self.with_context else ()

    def _operands(
        self,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        context_weight: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W1, b1 or, with a context, b1 + U context of each token, and |w2|."""
        dtype = torch.float64 if w1.dtype == torch.float64 else self.force_dtype
        bias = b1.to(dtype)
        if context_weight is not None:
            if context is None:
                raise ValueError("this potential depends on a context; pass what its context(q, p) returns")
            bias = linear(context.to(dtype), context_weight.to(dtype), bias)
        return w1.to(dtype), bias, w2.abs().to(dtype)

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        w1, b1, w2 = (x.to(q.dtype) for x in self._operands(*coefficients))
        return symplectic.potential(q, w1, b1, w2, self.phi, self.confinement) - LOWEST[self.phi] * w2.sum()

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        return self.field(*coefficients)(q)

    def field(self, *coefficients: Tensor) -> Callable[[Tensor], Tensor]:
        w1, b1, w2 = self._operands(*coefficients)
        # w2 joins the smaller factor.
        outward = -w2.unsqueeze(1) * w1

        def force(q: Tensor) -> Tensor:
            shared = b1.dim() == 1
            hidden = linear(q.to(w1.dtype), w1, b1 if shared else None)
            slope = slope_of(hidden if shared else hidden + b1, self.phi)
            pull = matmul(slope, outward).to(q.dtype)
            return pull.sub(q, alpha=self.confinement) if self.confinement else pull

        return force

    @torch.no_grad()
    def advance(
        self, q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...], stages: Stages, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, context = self._parted(coefficients)
        ends = [
            symplectic.advance(some_q, some_p, *self._operands(*weights, *given), **self._flow(stages, scale))
            for some_q, some_p, *given in self._chunks((q, p), context)
        ]
        end_q, end_p, peaks = zip(*ends, strict=True)
        return _joined(end_q, q), _joined(end_p, p), torch.stack(peaks).amax()

    @torch.no_grad()
    def undo(
        self,
        grad_q: Tensor,
        grad_p: Tensor,
        end_q: Tensor,
        end_p: Tensor,
        coefficients: tuple[Tensor, ...],
        stages: Stages,
        scale: float,
        parameters: bool = True,
        rebuilt: bool = True,
    ) -> tuple[Tensor, ...]:
        weights, context = self._parted(coefficients)
        # The gradient of the context is made of that of b1.
        parameters = parameters or self.with_context
        sums = [x.new_zeros(x.shape if parameters else 0, dtype=precise(x)) for x in weights]
        of_tokens = []
        for chunk in self._chunks((grad_q, grad_p, end_q, end_p), context):
            some_grad_q, some_grad_p, some_q, some_p, *given = chunk
            w1, bias, w2 = self._operands(*weights, *given)
            operands, flow = (some_q, some_p, w1, bias, w2), self._flow(stages, scale)
            *states, grad_w1, grad_bias, grad_w2 = symplectic.undo(
                some_grad_q, some_grad_p, *operands, **flow, parameters=parameters, rebuilt=rebuilt
            )
            changes = [grad_w1, grad_bias, grad_w2]
            for x in given:
                changes[1] = grad_bias.sum(0, dtype=sums[1].dtype)
                changes.append(matmul(grad_bias.t(), x.to(bias.dtype)))
                states.append(matmul(grad_bias, weights[3].to(bias.dtype)))
            for total, change in zip(sums, changes, strict=True):
                total += change
            of_tokens.append(states)
        if parameters:
            sums[2] *= weights[2].sign()
        likes = (*[end_q if rebuilt else end_q.new_empty(0)] * 2, *[end_q] * 2, *context)
        start_q, start_p, *gradients = (
            _joined(parts, like) for parts, like in zip(zip(*of_tokens, strict=True), likes, strict=True)
        )
        grads = zip((*sums, *gradients[2:]), coefficients, strict=True)
        return start_q, start_p, *gradients[:2], *(grad.to(x.dtype) for grad, x in grads)

    def _parted(self, coefficients: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The parameters, and the context if there is one."""
        count = 3 + self.with_context
        return coefficients[:count], coefficients[count:]

    def _flow(self, stages: Stages, scale: float) -> dict[str, Any]:
        """What the kernel is told beside tensors."""
        return {
            "kicks": stages.kicks,
            "drifts": stages.drifts,
            "phi": self.phi,
            "confinement": self.confinement,
            "scale": scale,
        }

    def _chunks(
        self, states: tuple[Tensor, ...], context: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Rows (tokens, features) of tensors (..., features); some tokens at a time where each has its b1.

        The context is contiguous, because products sum in another order over another layout.
        """
        rows = [x.reshape(-1, x.shape[-1]) for x in (*states, *(x.contiguous() for x in context))]
        return zip(
            *(x.split(_tokens_at_a_time(x) if self.with_context else len(x) or 1) for x in rows), strict=True
        )


def _tokens_at_a_time(x: Tensor) -> int:
    """A GPU takes more, to be filled."""
    return CHUNK if x.device.type == "cpu" else 16 * CHUNK


def _joined(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(like.shape)


class DuffingPotential(Potential):
    """V(q) = sum_k stiffness_k q_k^2 / 2 + |quartic_k| q_k^4 / 4: in each channel a spring that hardens.

    Args:
        features: D, channels of q.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.ones(features))
        self.quartic = nn.Parameter(torch.full((features,), 0.01))

    def value(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        stiffness, quartic = (x.to(q.dtype) for x in coefficients)
        square = q.square()
        return (square * (0.5 * stiffness + 0.25 * quartic.abs() * square)).sum(-1)

    def force(self, q: Tensor, *coefficients: Tensor) -> Tensor:
        stiffness, quartic = (x.to(q.dtype) for x in coefficients)
        return -q * (stiffness + quartic.abs() * q.square())
