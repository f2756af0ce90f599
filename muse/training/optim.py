"""AdamW and Muon from torch, over float32 or bfloat16 parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from muse.config import OptimConfig
from muse.errors import ConfigError
from muse.layers import ComplexLinear
from muse.processes.ranks import all_gathered, all_reduced_sum, distributed_like, local

# Elements of a bfloat16 parameter that are updated at a time: their float32 copies fit the last-level cache.
SLICE_ELEMENTS = 2**20


class ModelOptimizer:
    """torch's optimisers over slices of a model's parameters.

    A float32 parameter is one slice and is stepped in place. Parameters stored in bfloat16 lose updates
    smaller than 1/256 of their value if they are rounded to nearest; here slice after slice is copied to
    float32 together with its state, stepped there, and rounded back stochastically, which keeps the
    expectation of every update (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
    Memory: parameter, gradient and state in bfloat16, and a float32 copy of one slice.
    Of a sharded parameter a rank steps its own part.

    Args:
        model: its parameters must have their final device, dtype and shards.
        config: optimiser options.
        seed: seed of the rounding, which depends on nothing else but the step.

    Raises:
        ConfigError: ``second_moment=modulus`` and the planes of a parameter lie on different ranks.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.slices: list[tuple[nn.Parameter, int, int, Tensor]] = []
        # Of each slice, and of each parameter as this rank holds it; the former are views of the latter.
        self._slice_moments: list[dict[str, Tensor]] = []
        self._moments: dict[str, tuple[nn.Parameter, dict[str, Tensor]]] = {}
        self.updates = 0
        self.rounded = any(p.dtype == torch.bfloat16 for p in model.parameters())
        matrices, decayed, plain = [], [], []
        for name, parameter, plane_axis, hidden in _roles(model):
            if config.name == "muon" and hidden:
                # Muon takes matrices: the planes of a complex weight are stacked.
                matrices += self._slice(name, parameter, plane_axis, ("momentum_buffer",), whole=True)
            elif name.endswith("weight") and parameter.dim() > 1:
                decayed += self._slice(name, parameter, plane_axis, ("exp_avg", "exp_avg_sq"))
            else:
                plain += self._slice(name, parameter, plane_axis, ("exp_avg", "exp_avg_sq"))
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        betas = (config.betas[0], config.betas[1])
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.lr,
                betas=betas,
                eps=config.eps,
                fused=True,
            )
        ]
        self.peaks = [config.lr]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
            self.optimizers.append(muon)
            self.peaks.append(config.muon_lr)
        self._set_state()

    def _slice(
        self,
        name: str,
        parameter: nn.Parameter,
        plane_axis: int | None,
        moments: tuple[str, ...],
        whole: bool = False,
    ) -> list[Tensor]:
        """Register the slices of a parameter: views along its first axis that share its storage."""
        split = [place.dim for place in getattr(parameter, "placements", ()) if isinstance(place, Shard)]
        if self.config.second_moment == "modulus" and plane_axis in split:
            raise ConfigError(
                f"hardware.parallel=fsdp puts the planes of {name} on different ranks, and "
                "optim.second_moment=modulus needs both; choose plane, or hardware.parallel=ddp"
            )
        held = local(parameter.detach())
        kept = {moment: torch.zeros_like(held) for moment in moments}
        self._moments[name] = (parameter, kept)
        rows = held.shape[0]
        step = rows
        if self.rounded and not whole and plane_axis != 0 and rows:
            step = max(1, SLICE_ELEMENTS * rows // held.numel())
        views = []
        for start in range(0, rows, step or 1):
            stop = min(start + step, rows)
            view, *parts = (
                x[start:stop].flatten(0, -2) if whole else x[start:stop] for x in (held, *kept.values())
            )
            # The plane axis is all that a slice must still know of its parameter.
            view.plane_axis = None if whole else plane_axis  # type: ignore[attr-defined]
            self.slices.append((parameter, start, stop, view))
            self._slice_moments.append(dict(zip(moments, parts, strict=True)))
            views.append(view)
        return views

    def _set_state(self) -> None:
        """Give torch's optimisers the moments, and the number of updates so far."""
        moments = {slice_[3]: kept for slice_, kept in zip(self.slices, self._slice_moments, strict=True)}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for view in group["params"]:
                    optimizer.state[view] = dict(moments[view])
                    if isinstance(optimizer, torch.optim.AdamW):
                        count = torch.tensor(float(self.updates), device=view.device)
                        optimizer.state[view]["step"] = count

    def set_learning_rate(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    @torch.no_grad()
    def attach_gradients(self) -> None:
        """Give every slice its part of the gradient of its parameter."""
        for parameter, start, stop, view in self.slices:
            gradient = parameter.grad
            view.grad = None if gradient is None else local(gradient)[start:stop].view_as(view)

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
        noise = _rounding_noise(self.seed, step, self.slices[0][3].device) if self.rounded else None
        for optimizer in self.optimizers:
            adam = isinstance(optimizer, torch.optim.AdamW)
            if noise is not None:
                self._rounded_step(optimizer, adam, factor, noise)
                continue
            for group in optimizer.param_groups:
                for view in group["params"]:
                    if view.grad is None:
                        continue
                    if factor != 1.0:
                        view.grad.mul_(factor)
                    if adam:
                        self._share_second_moment(view, view, optimizer.state[view])
            optimizer.step()

    def _rounded_step(
        self, optimizer: torch.optim.Optimizer, adam: bool, factor: float, noise: Tensor
    ) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        try:
            for group in groups:
                for view in group["params"]:
                    if view.grad is None:
                        continue
                    scratch = view.float()
                    scratch.grad = view.grad.float()
                    if factor != 1.0:
                        scratch.grad.mul_(factor)
                    kept = {k: v.float() for k, v in state[view].items()}
                    if adam:
                        self._share_second_moment(view, scratch, kept)
                    optimizer.param_groups = [{**group, "params": [scratch]}]
                    optimizer.state = defaultdict(dict, {scratch: kept})
                    optimizer.step()
                    _round_into(view, scratch, noise)
                    for key, value in optimizer.state[scratch].items():
                        if key == "step":
                            state[view][key] = value
                            continue
                        # A moment that changes by more than its rounding in a step needs no luck to move.
                        if adam and max(self.config.betas) > 1 - 2 * torch.finfo(view.dtype).eps:
                            _round_into(state[view][key], value, noise)
                        else:
                            state[view][key].copy_(value)
        finally:
            optimizer.param_groups, optimizer.state = groups, state

    def _share_second_moment(self, view: Tensor, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make AdamW's second moment of a planar parameter |g|^2 on both planes.

        AdamW is about to compute v <- b v + (1 - b) g^2; adding (1 - b)/b g'^2 with g' the gradient of the
        other plane turns that into v <- b v + (1 - b) |g|^2.
        """
        axis = view.plane_axis  # type: ignore[attr-defined]
        if self.config.second_moment != "modulus" or axis is None:
            return
        beta = self.config.betas[1]
        assert parameter.grad is not None
        other = parameter.grad.flip(axis)
        state["exp_avg_sq"].addcmul_(other, other, value=(1 - beta) / max(beta, 1e-12))

    def state_tensors(self) -> list[Tensor]:
        """The optimisers' moments."""
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return [value for state in states for key, value in state.items() if key != "step"]

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


def _rounding_noise(seed: int, step: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 2^16), int32 (largest slice,): one for each element of a slice."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    return torch.randint(
        0, 2**16, (2 * SLICE_ELEMENTS,), dtype=torch.int32, device=device, generator=generator
    )


def _round_into(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """Round float32 ``value`` to a bfloat16 ``target``, up with the probability of the part cut off."""
    if target.dtype == torch.float32:
        target.copy_(value)
        return
    count = value.numel()
    if count > noise.numel():
        noise = noise.repeat(-(-count // noise.numel()))
    bits = value.view(torch.int32).add_(noise[:count].view(value.shape))
    target.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))


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
