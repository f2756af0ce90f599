"""AdamW and Muon over float32 or bfloat16 parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from kernels.adamw import Part, adamw, coefficients, key_of, round_stochastically
from muse.config import OptimConfig
from muse.errors import ConfigError
from muse.layers import ComplexLinear
from muse.processes.ranks import all_gathered, all_reduced_sum, distributed_like, local, run_starts


class ModelOptimizer:
    """AdamW, and Muon for matrices, over a model's parameters.

    Float32 parameters are stepped in place by torch's optimisers. Parameters stored in bfloat16 lose updates
    smaller than 1/256 of their value if they are rounded to nearest; they are rounded stochastically, which
    keeps the expectation of every update (Gupta et al., "Deep Learning with Limited Numerical Precision",
    2015): under AdamW all at once by ``kernels.adamw``, under Muon from a float32 copy of one matrix. Their
    state is bfloat16, too. Of a sharded parameter a rank steps its own part.

    Args:
        model: its parameters must have their final device, dtype and shards.
        config: optimiser options.
        seed: seed of the rounding, which depends on nothing else but the step, the name of a parameter and
            the position of a number in it.

    Raises:
        ConfigError: ``second_moment=modulus`` and the planes of a parameter lie on different ranks.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.updates = 0
        self.learning_rate = config.lr
        self.betas = (config.betas[0], config.betas[1])
        # Of each parameter as this rank holds it.
        self._moments: dict[str, tuple[nn.Parameter, dict[str, Tensor]]] = {}
        # What kernels.adamw steps, and what torch's optimisers do, in the storage of parameters and moments.
        self._parts: dict[str, Part] = {}
        self._views: dict[str, Tensor] = {}
        matrices: list[Tensor] = []
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter, plane_axis, hidden in _roles(model):
            held = local(parameter.detach())
            by_muon = config.name == "muon" and hidden
            moments = ("momentum_buffer",) if by_muon else ("exp_avg", "exp_avg_sq")
            kept = {moment: torch.zeros_like(held) for moment in moments}
            self._moments[name] = (parameter, kept)
            axis = self._shared_axis(name, parameter, plane_axis)
            if not held.numel():
                continue
            decays = name.endswith("weight") and parameter.dim() > 1
            if held.dtype == torch.bfloat16 and not by_muon:
                plane = 0 if axis is None else held.shape[axis + 1 :].numel()
                self._parts[name] = Part(
                    held, kept["exp_avg"], kept["exp_avg_sq"], decays, run_starts(parameter), plane
                )
                continue
            # Muon takes matrices: the planes of a complex weight are stacked.
            view = self._views[name] = held.flatten(0, -2) if by_muon else held.view(held.shape)
            view.shared_axis = axis  # type: ignore[attr-defined]
            (matrices if by_muon else decayed if decays else plain).append(view)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.peaks = []
        if decayed or plain:
            groups = [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ]
            filled = [group for group in groups if group["params"]]
            adam = torch.optim.AdamW(filled, lr=config.lr, betas=self.betas, eps=config.eps, fused=True)
            self.optimizers.append(adam)
            self.peaks.append(config.lr)
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
            self.optimizers.append(muon)
            self.peaks.append(config.muon_lr)
        self._set_state()

    def _shared_axis(self, name: str, parameter: nn.Parameter, plane_axis: int | None) -> int | None:
        """The axis of the planes of a parameter that share their second moment."""
        if self.config.second_moment != "modulus":
            return None
        split = [place.dim for place in getattr(parameter, "placements", ()) if isinstance(place, Shard)]
        if plane_axis in split:
            raise ConfigError(
                f"hardware.parallel=fsdp puts the planes of {name} on different ranks, and "
                "optim.second_moment=modulus needs both; choose plane, or hardware.parallel=ddp"
            )
        return plane_axis

    def _set_state(self) -> None:
        """Give torch's optimisers the moments, and the number of updates so far."""
        names = {view: name for name, view in self._views.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for view in group["params"]:
                    kept = self._moments[names[view]][1]
                    optimizer.state[view] = {moment: part.view_as(view) for moment, part in kept.items()}
                    if isinstance(optimizer, torch.optim.AdamW):
                        count = torch.tensor(float(self.updates), device=view.device)
                        optimizer.state[view]["step"] = count

    def set_learning_rate(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        self.learning_rate = self.config.lr * factor
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    @torch.no_grad()
    def attach_gradients(self) -> None:
        """Give torch's optimisers the gradients of their parameters."""
        for name, view in self._views.items():
            gradient = self._moments[name][0].grad
            view.grad = None if gradient is None else local(gradient).view_as(view)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, on whatever ranks they are; a float32 scalar tensor."""
        # Row by row in the gradient's dtype, because a reduction of bfloat16 to float32 in one call is 20
        # times slower on a CPU; the rounding errors of many rows average out.
        gradients = [p.grad for p, _ in self._moments.values() if p.grad is not None]
        rows = [
            torch.linalg.vector_norm(g.flatten(0, -2) if g.dim() > 1 else g, dim=-1)
            for g in map(local, gradients)
        ]
        norm = torch.linalg.vector_norm(torch.cat([norms.float().flatten() for norms in rows]))
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            norm = all_reduced_sum(norm.square()).sqrt()
        return norm

    @torch.no_grad()
    def step(self, step: int, factor: float = 1.0) -> None:
        """Update the parameters from the attached gradients times ``factor``.

        Args:
            step: index of the step; with the seed it decides the stochastic rounding.
            factor: multiplies gradients, e.g. by a clipping coefficient.
        """
        self.updates += 1
        self._step_parts(step, factor)
        names = {view: name for name, view in self._views.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for view in group["params"]:
                    if view.grad is None:
                        continue
                    if view.dtype == torch.bfloat16:
                        self._step_rounded(optimizer, group, view, names[view], step, factor)
                        view.grad = None
                        continue
                    if factor != 1.0:
                        view.grad.mul_(factor)
                    self._share_second_moment(view, optimizer.state[view])
            optimizer.step()

    def _step_parts(self, step: int, factor: float) -> None:
        found = {name: self._moments[name][0].grad for name in self._parts}
        gradients = {name: local(x).contiguous() for name, x in found.items() if x is not None}
        numbers = coefficients(
            self.learning_rate,
            self.betas,
            self.config.eps,
            self.config.weight_decay,
            self.updates,
            factor,
        )
        adamw(
            [self._parts[name] for name in gradients],
            list(gradients.values()),
            [key_of(self.seed, step, name) for name in gradients],
            numbers,
            # A moment that changes by more than its rounding in a step needs no luck to move.
            round_moments=max(self.betas) > 1 - 2 * torch.finfo(torch.bfloat16).eps,
        )

    def _step_rounded(
        self,
        muon: torch.optim.Optimizer,
        group: dict[str, Any],
        view: Tensor,
        name: str,
        step: int,
        factor: float,
    ) -> None:
        """Muon's step of one matrix in bfloat16."""
        assert view.grad is not None
        groups, state = muon.param_groups, muon.state
        scratch = view.float()
        scratch.grad = view.grad.float().mul_(factor)
        try:
            muon.param_groups = [{**group, "params": [scratch]}]
            muon.state = defaultdict(dict, {scratch: {k: v.float() for k, v in state[view].items()}})
            muon.step()
            found = muon.state[scratch]
        finally:
            muon.param_groups, muon.state = groups, state
        key, starts = key_of(self.seed, step, name), run_starts(self._moments[name][0])
        round_stochastically(view, scratch, key, starts)
        for moment, value in found.items():
            state[view][moment].copy_(value)

    def _share_second_moment(self, view: Tensor, state: dict[str, Any]) -> None:
        """Make AdamW's second moment of a planar parameter |g|^2 on both planes.

        AdamW is about to compute v <- b v + (1 - b) g^2; adding (1 - b)/b g'^2 with g' the gradient of the
        other plane turns that into v <- b v + (1 - b) |g|^2.
        """
        if view.shared_axis is None or "exp_avg_sq" not in state:  # type: ignore[attr-defined]
            return
        assert view.grad is not None
        beta = self.betas[1]
        other = view.grad.flip(view.shared_axis)  # type: ignore[attr-defined]
        state["exp_avg_sq"].addcmul_(other, other, value=(1 - beta) / max(beta, 1e-12))

    def state_tensors(self) -> list[Tensor]:
        """The optimisers' moments."""
        return [part for _, kept in self._moments.values() for part in kept.values()]

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and, by the name of the parameter, its moments, distributed as it is.

        Moments share their storage with those in use.
        """
        moments = {
            name: {moment: distributed_like(parameter, part) for moment, part in kept.items()}
            for name, (parameter, kept) in self._moments.items()
        }
        return {"updates": torch.tensor(self.updates), "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state over; moments of a state dict of this very optimiser are there already."""
        for name, (_, kept) in self._moments.items():
            for moment, part in kept.items():
                part.copy_(local(state["moments"][name][moment]))
        self.updates = int(state["updates"])
        self._set_state()


def _roles(model: nn.Module) -> list[tuple[str, nn.Parameter, int | None, bool]]:
    """(name, parameter, plane axis, whether it is the matrix of a linear map inside a block), each once."""
    roles: list[tuple[str, nn.Parameter, int | None, bool]] = []
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            linear = isinstance(module, (ComplexLinear, nn.Linear)) and not prefix.endswith("head")
            local = name.rpartition(".")[2]
            plane_axis = getattr(module, "plane_axes", {}).get(local)
            roles.append((name, parameter, plane_axis, linear and local == "weight"))
    return roles


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter that is not finite, or else of the first whose gradient is not.

    One bad parameter makes nearly every gradient bad, so parameters come first. Every rank must ask.
    """
    parameters = list(model.named_parameters())
    tensors = [(name, parameter.detach()) for name, parameter in parameters]
    tensors += [(f"the gradient of {name}", p.grad) for name, p in parameters if p.grad is not None]
    bad = (place for place, (_, tensor) in enumerate(tensors) if not local(tensor).isfinite().all())
    first = min(all_gathered(next(bad, len(tensors))))
    return tensors[first][0] if first < len(tensors) else None
