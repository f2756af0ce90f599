"""HamiltonianNeuralODE: a symplectic flow of every token, with four gradient modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.planar import upcast
from kernels.symplectic import LIMIT, undone_flow
from muse.dynamics.fallback import FallsBack
from muse.dynamics.integrators import Stages, stages
from muse.dynamics.potential import Potential
from muse.errors import RunError


class HamiltonianNeuralODE(FallsBack):
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
    and counts it in ``fallback_count``. To see it a call waits for the device, unless ``deferred_checks``
    leaves that to the caller.

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

    safe_way = "stage.gradient=checkpoint"

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
        super().__init__(name)
        self.potential = potential
        self.steps, self.dt, self.integrator, self.gradient = steps, dt, integrator, gradient
        self.recon_threshold, self.verify = recon_threshold, verify
        self.stages = stages(integrator, steps, dt)
        self.scale = 2.0**fraction_bits if gradient == "exact" else 0.0
        # The largest error since it was last read, of the modes that compare.
        self.reconstruction_error: float | None = None
        # Shown the input of each call; see ``muse.dynamics.watch``.
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    @property
    def compares(self) -> bool:
        """Whether the rebuilt initial state is compared with the one that was given."""
        return self.gradient == "reversible" or (self.gradient == "exact" and self.verify)

    # A graph break costs nothing beside a flow, and what its backward pass decides cannot be traced.
    @torch.compiler.disable
    def forward(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """q and p (..., D) after all steps, float32, or float64 if they are; gradients by this layer's mode.

        Raises:
            RunError: the state is not finite; says in which layer and step.
        """
        q, p = upcast(q), upcast(p)
        with torch.autocast(q.device.type, enabled=False):
            if self.watch is not None:
                self.watch(q, p)
            return self._flow(q, p)

    def _flow(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = (*self.potential.coefficients(), *self.potential.context(q, p))
        if self.gradient in ("exact", "reversible") and not self.fallen_back:
            end_q, end_p, peak = undone_flow(
                self._advance,
                self._undo,
                q,
                p,
                coefficients,
                self.scale,
                self._compare if self.compares else None,
            )
            # What compares waits for the device anyway.
            if (self.deferred and not self.compares) or peak.item() < (LIMIT if self.scale else math.inf):
                return end_q, end_p
            self._refuse_non_finite(q, p, coefficients)
            self.fall_back(
                f"its state left the range of +-{LIMIT / self.scale:g} of stage.fraction_bits="
                f"{math.frexp(self.scale)[1] - 1}"
                if self.scale
                else "its state was not finite"
            )
        if self.gradient == "backprop" or not torch.is_grad_enabled():
            end_q, end_p = _run(self.potential, q, p, self.stages, coefficients)
        else:
            end_q, end_p = self._checkpointed(q, p, coefficients)
        if not self.deferred and q.numel() and not (end_q.sum() + end_p.sum()).isfinite():
            self._refuse_non_finite(q, p, coefficients)
        return end_q, end_p

    def _advance(self, q: Tensor, p: Tensor, *coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.potential.advance(q, p, coefficients, self.stages, self.scale)

    def _undo(
        self,
        grad_q: Tensor,
        grad_p: Tensor,
        q: Tensor,
        p: Tensor,
        *coefficients: Tensor,
        parameters: bool,
        rebuilt: bool,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(q.device.type, enabled=False):
            flow = self.stages, self.scale
            return self.potential.undo(grad_q, grad_p, q, p, coefficients, *flow, parameters, rebuilt)

    def _compare(
        self,
        start_q: Tensor,
        start_p: Tensor,
        grad_q: Tensor,
        grad_p: Tensor,
        q: Tensor,
        p: Tensor,
        *coefficients: Tensor,
    ) -> list[Tensor | None] | None:
        """Note the error of the rebuilt state; gradients by checkpointing where it is too large."""
        error = _distance((start_q, start_p), (q, p), self.scale)
        self.reconstruction_error = max(error, self.reconstruction_error or 0.0)
        if error <= (0.0 if self.scale else self.recon_threshold):
            return None
        self.fall_back(f"the initial state was rebuilt with an error of {error:.2g}")
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            inputs = [x.detach().requires_grad_() for x in (q, p, *coefficients)]
            ends = self._checkpointed(inputs[0], inputs[1], tuple(inputs[2:]))
            return list(torch.autograd.grad(ends, inputs, (grad_q, grad_p), allow_unused=True))

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


def _distance(rebuilt: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor], scale: float) -> float:
    """The largest difference of an element."""
    if not rebuilt[0].numel():
        return 0.0
    held = [(x * scale).round() if scale else x for x in given]
    worst = max((x.double() - y).abs().max().item() for x, y in zip(rebuilt, held, strict=True))
    return worst / (scale or 1.0)


def flow_metrics(model: nn.Module, taken: Iterable[float | None] = ()) -> dict[str, float]:
    """Fallbacks of all flows of a model, and its largest reconstruction error: of those taken, and since."""
    flows = flows_of(model)
    if not flows:
        return {}
    metrics = {"flow/fallbacks": float(sum(flow.fallback_count.item() for flow in flows))}
    errors = [error for error in (*taken, take_reconstruction_error(model)) if error is not None]
    return {**metrics, "flow/reconstruction_error": max(errors)} if errors else metrics


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
