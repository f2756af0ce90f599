"""HamiltonianNeuralODE: a symplectic flow of every token, with four ways to its gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.symplectic import LIMIT
from muse.dynamics.integrators import Stages, stages
from muse.dynamics.potential import Potential
from muse.errors import RunError
from muse.processes.ranks import largest, ranks


class HamiltonianNeuralODE(nn.Module):
    """(q, p) = (Re z, Im z) flows through H(q, p) = |p|^2 / 2 + V(q), every token by itself.

    Gradients are those of the discrete map, by

    - ``exact``: the state is int32 in units of 2^-fraction_bits and every kick and drift adds a whole number,
      so the backward pass rebuilds each state to the last bit and only the final one is kept, with the
      context if the potential has one;
    - ``reversible``: the same in floating point; the initial state is kept, too, and compared with the
      rebuilt one. With forces in half precision the last bit of a state decides about much more, and this
      mode falls back. In the literature both are reversible discrete adjoints. What the seeds call symplectic
      adjoint is this; Matsubara's method of that name keeps checkpoints;
    - ``checkpoint``: segments of sqrt(stages) stages are computed again;
    - ``backprop``: plain autograd through the loop, the reference for the others.

    A state that leaves the range of ``exact``, or is not rebuilt within ``recon_threshold``, costs nothing
    but memory: the gradient of that call is taken by checkpointing, the layer stays in that mode, warns once
    and counts it in ``fallback_count``.

    Args:
        potential: V.
        steps: number of steps.
        dt: size of a step.
        integrator: a name of ``muse.dynamics.integrators.INTEGRATORS``.
        gradient: ``exact``, ``reversible``, ``checkpoint`` or ``backprop``.
        fraction_bits: of the fixed-point state; its range is 2^(31 - fraction_bits).
        recon_threshold: largest reconstruction error (maximum norm) of ``reversible``.
        verify: ``exact`` keeps the initial state, too, and compares every bit of it.
        name: what messages call this layer.
    """

    fallback_count: Tensor

    def __init__(
        self,
        potential: Potential,
        steps: int = 10,
        dt: float = 0.1,
        integrator: str = "blanes_moan_rkn4",
        gradient: str = "exact",
        fraction_bits: int = 23,
        recon_threshold: float = 1e-5,
        verify: bool = False,
        name: str = "flow",
    ) -> None:
        super().__init__()
        self.potential = potential
        self.steps, self.dt, self.integrator, self.gradient = steps, dt, integrator, gradient
        self.recon_threshold, self.verify, self.name = recon_threshold, verify, name
        self.stages = stages(integrator, steps, dt)
        self.scale = 2.0**fraction_bits if gradient == "exact" else 0.0
        # The largest error since it was last read, of the modes that compare.
        self.reconstruction_error: float | None = None
        # Shown the input of each call; see ``muse.dynamics.watch``.
        self.watch: Callable[[Tensor], None] | None = None
        self.register_buffer("fallback_count", torch.zeros((), dtype=torch.int64))
        self.fallen_back = False
        self.register_load_state_dict_post_hook(_remember_fallback)

    @property
    def compares(self) -> bool:
        """Whether the rebuilt initial state is compared with the one that was given."""
        return self.gradient == "reversible" or (self.gradient == "exact" and self.verify)

    # A graph break costs nothing beside a flow, and what its backward pass decides cannot be traced.
    @torch.compiler.disable
    def forward(self, z: Tensor) -> Tensor:
        """The state after all steps, planar (..., 2, D), float32 (float64 if z is).

        Raises:
            RunError: the state is not finite; says in which layer and step.
        """
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        with torch.autocast(z.device.type, enabled=False):
            if self.watch is not None:
                self.watch(z)
            q, p = self.flow(*z.to(dtype).unbind(-2))
        return torch.stack((q, p), -2)

    def flow(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """q and p (..., D) after all steps; gradients by the mode of this layer."""
        coefficients = (*self.potential.coefficients(), *self.potential.context(q, p))
        if self.gradient in ("exact", "reversible") and not self.fallen_back:
            end_q, end_p, peak = _UndoneFlow.apply(self, q, p, *coefficients)
            largest = peak.item()
            if largest < (LIMIT if self.scale else math.inf):
                return end_q, end_p
            self._refuse_non_finite(q, p, coefficients)
            self._fall_back(
                f"its state left the range of +-{LIMIT / self.scale:g} of stage.fraction_bits="
                f"{math.frexp(self.scale)[1] - 1}"
                if self.scale
                else "its state was not finite"
            )
        if self.gradient == "backprop" or not torch.is_grad_enabled():
            q_end, p_end = _run(self.potential, q, p, self.stages, coefficients)
        else:
            q_end, p_end = self._checkpointed(q, p, coefficients)
        if q.numel() and not (q_end.sum() + p_end.sum()).isfinite():
            self._refuse_non_finite(q, p, coefficients)
        return q_end, p_end

    def _checkpointed(self, q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        count = len(self.stages.kicks)
        segment = math.isqrt(count - 1) + 1
        for start in range(0, count, segment):
            part = Stages(
                self.stages.kicks[start : start + segment], self.stages.drifts[start : start + segment]
            )
            q, p = checkpoint(
                _run, self.potential, q, p, part, coefficients, use_reentrant=False, preserve_rng_state=False
            )
        return q, p

    def _fall_back(self, reason: str) -> None:
        self.fallback_count += 1
        # Several calls may wait for their backward passes.
        if not self.fallen_back:
            warnings.warn(
                f"{self.name}: {reason}; this layer goes on with stage.gradient=checkpoint", stacklevel=2
            )
        self.fallen_back = True

    @torch.no_grad()
    def _refuse_non_finite(self, q: Tensor, p: Tensor, coefficients: tuple[Tensor, ...]) -> None:
        """Find the step in which a state becomes NaN or infinite.

        Raises:
            RunError: there is one.
        """
        step = stages(self.integrator, 1, self.dt)
        for done in range(self.steps + 1):
            if not (q.isfinite().all() and p.isfinite().all()):
                where = f"after step {done} of {self.steps}" if done else "before the first step"
                raise RunError(
                    f"{self.name}: the state of the flow is not finite {where}; a smaller stage.dt or "
                    "optim.lr, or stage.precision=fp32 may help"
                )
            if done < self.steps:
                q, p = _run(self.potential, q, p, step, coefficients)


class _UndoneFlow(torch.autograd.Function):
    """Keeps the final state only, and in the modes that compare the initial one; see HamiltonianNeuralODE."""

    @staticmethod
    def forward(
        ctx: Any, ode: HamiltonianNeuralODE, q: Tensor, p: Tensor, *coefficients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        end_q, end_p, peak = ode.potential.advance(q, p, coefficients, ode.stages, ode.scale)
        ctx.ode = ode
        ctx.save_for_backward(end_q, end_p, *((q, p) if ode.compares else ()), *coefficients)
        ctx.mark_non_differentiable(peak)
        if ode.scale:
            end_q, end_p = (x.to(q.dtype).mul_(1 / ode.scale) for x in (end_q, end_p))
        return end_q, end_p, peak

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_p: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        ode: HamiltonianNeuralODE = ctx.ode
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ode.name}: stage.gradient={ode.gradient} has no second derivative; use backprop"
            )
        end_q, end_p, *saved = ctx.saved_tensors
        given, coefficients = (saved[:2], saved[2:]) if ode.compares else ([], saved)
        with torch.autocast(grad_q.device.type, enabled=False):
            start_q, start_p, *gradients = ode.potential.undo(
                grad_q, grad_p, end_q, end_p, tuple(coefficients), ode.stages, ode.scale
            )
            if given:
                error = _distance((start_q, start_p), given, ode.scale)
                ode.reconstruction_error = max(error, ode.reconstruction_error or 0.0)
                if not error <= (0.0 if ode.scale else ode.recon_threshold):
                    ode._fall_back(f"the initial state was rebuilt with an error of {error:.2g}")
                    return None, *_by_checkpoints(ode, (*given, *coefficients), (grad_q, grad_p))
        return None, *gradients


def _run(
    potential: Potential, q: Tensor, p: Tensor, part: Stages, coefficients: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    force = potential.field(*coefficients)
    for kick, drift in zip(part.kicks, part.drifts, strict=True):
        if kick:
            p = p.add(force(q), alpha=kick)
        if drift:
            q = q.add(p, alpha=drift)
    return q, p


def _distance(rebuilt: tuple[Tensor, Tensor], given: list[Tensor], scale: float) -> float:
    """The largest difference of an element."""
    if not rebuilt[0].numel():
        return 0.0
    held = [(x * scale).round() if scale else x for x in given]
    worst = max((x.double() - y).abs().max().item() for x, y in zip(rebuilt, held, strict=True))
    return worst / (scale or 1.0)


def _by_checkpoints(
    ode: HamiltonianNeuralODE, inputs: tuple[Tensor, ...], grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    with torch.enable_grad():
        q, p, *coefficients = (x.detach().requires_grad_() for x in inputs)
        ends = ode._checkpointed(q, p, tuple(coefficients))
        return list(torch.autograd.grad(ends, (q, p, *coefficients), grads, allow_unused=True))


def _remember_fallback(ode: HamiltonianNeuralODE, _: Any) -> None:
    ode.fallen_back = bool(ode.fallback_count)


def agree_on_fallbacks(model: nn.Module) -> None:
    """Let a layer fall back on every rank if it did on one, so that ranks stay interchangeable.

    The count becomes the largest of any rank.
    """
    flows = flows_of(model)
    if not flows or ranks() == 1:
        return
    counts = largest(torch.stack([flow.fallback_count for flow in flows]))
    for flow, count in zip(flows, counts.unbind(), strict=True):
        flow.fallback_count.copy_(count)
        _remember_fallback(flow, None)


def flow_metrics(model: nn.Module) -> dict[str, float]:
    """Fallbacks of all flows of a model, and the largest reconstruction error since that was last taken."""
    flows = flows_of(model)
    if not flows:
        return {}
    metrics = {"flow/fallbacks": float(sum(flow.fallback_count.item() for flow in flows))}
    error = take_reconstruction_error(model)
    return metrics if error is None else {**metrics, "flow/reconstruction_error": error}


def take_reconstruction_error(model: nn.Module) -> float | None:
    """The largest reconstruction error of a model's flows since the last call; None where none compared."""
    flows = flows_of(model)
    errors = [flow.reconstruction_error for flow in flows if flow.reconstruction_error is not None]
    for flow in flows:
        flow.reconstruction_error = None
    return max(errors, default=None)


def flows_of(model: nn.Module) -> list[HamiltonianNeuralODE]:
    """The flows of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, HamiltonianNeuralODE)]
