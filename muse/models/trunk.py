"""What carries the state of a decoder from block to block, beside plain residual sums.

The reversible trunk has a momentum v beside the state z. Sub-layer l, of L in all, is a kick and a drift,

    v += a_l f_l(norm z)        a_l = 1 / (c_l + ... + c_(L-1))
    z += c_l v                  c_l = decay^l

so that in the end each sub-layer has been added once, as in a residual trunk, and all but a share ``decay``
of what it still lacks is there after each step. z and v are multiples of 2^-FRACTION_BITS, and so is all that
is added to them, in float64, whose sums of such numbers are exact up to 2^53 of them. The backward pass
subtracts the very numbers that were added, last one first: it needs the final pair only, computes every
sub-layer once more from the input it rebuilds to the last bit, and takes the gradient there. What is kept
depends neither on the depth nor on what sub-layers keep.

v grows as decay^-l, which takes bits: ``drifts_of`` lets the drifts of deep trunks fall slower.

Reversible trunks in floating point: Gomez et al., "The Reversible Residual Network" (2017), and Kitaev et
al., "Reformer" (2020), with two streams; Sander et al., "Momentum Residual Neural Networks" (2021), with a
momentum. Whole numbers that make a momentum exactly reversible: Maclaurin et al., "Gradient-based
Hyperparameter Optimization through Reversible Learning" (2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from muse.dynamics import FallsBack
from muse.errors import RunError
from muse.hardware import restore_torch_random_state, torch_random_state
from muse.layers.packing import Packing
from muse.layers.recompute import recomputed_as_a_whole, recomputed_call

# The resolution of z is that of float32 at about 8.
FRACTION_BITS = 20
UNIT = 2.0**-FRACTION_BITS
# What v may grow by; 9 more bits are left for the sum of what sub-layers add.
GROWTH_BITS = 24


@dataclass(frozen=True)
class Sublayer:
    """dropout(map(norm x)), what a block adds to its state in one place.

    Attributes:
        norm: of the state.
        map: of what is normalised; takes the cache, if there is one.
        dropout: of what the map gives.
        cache: what the map keeps of the tokens before.
        packing: of documents that the map keeps apart.
    """

    norm: nn.Module
    map: nn.Module
    dropout: nn.Module
    cache: Any = None
    packing: Packing | None = None

    def __call__(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        if self.packing is not None:
            return self.dropout(self.map(normal, self.cache, self.packing))
        return self.dropout(self.map(normal) if self.cache is None else self.map(normal, self.cache))

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for part in (self.norm, self.map) for p in part.parameters() if p.requires_grad]

    @property
    def random(self) -> bool:
        """Whether two calls differ."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p > 0


class Path(Protocol):
    """How a sub-layer moves the state of a trunk."""

    def step(self, sublayer: Sublayer, position: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]: ...


class TrunkState(NamedTuple):
    """What blocks hand on in a trunk with a momentum.

    Attributes:
        position: z, or what autograd takes for it.
        momentum: v, likewise.
        path: how sub-layers move them.
    """

    position: Tensor
    momentum: Tensor
    path: Path

    def through(self, sublayers: Sequence[Sublayer]) -> TrunkState:
        """The state after sub-layers."""
        position, momentum = self.position, self.momentum
        for sublayer in sublayers:
            position, momentum = self.path.step(sublayer, position, momentum)
        return TrunkState(position, momentum, self.path)


def through(
    state: Any,
    blocks: Iterable[nn.Module],
    caches: Sequence[Any] | None = None,
    packing: Packing | None = None,
) -> Any:
    """The state, of whatever trunk, after blocks; each takes its cache, if there are any, or the packing."""
    if packing is not None:
        for block in blocks:
            state = block(state, packing=packing)
    elif caches is None:
        for block in blocks:
            state = block(state)
    else:
        for block, cache in zip(blocks, caches, strict=True):
            state = block(state, cache)
    return state


def drifts_of(sublayers: int, decay: float) -> list[float]:
    """c_l for each sub-layer: powers of ``decay``, or of the least larger number that GROWTH_BITS allow."""
    slowest = 2.0 ** (-GROWTH_BITS / (sublayers - 1)) if sublayers > 1 else 1.0
    return [max(decay, slowest) ** number for number in range(sublayers)]


def kicks_of(drifts: Sequence[float]) -> list[float]:
    """a_l for each sub-layer: what lets its update count once in the end."""
    return [1 / math.fsum(drifts[number:]) for number in range(len(drifts))]


class ReversibleTrunk(FallsBack):
    """See the module. After a fallback z and v are floating point, and sub-layers are checkpointed.

    That every input was rebuilt to the last bit is seen at the end of each backward pass, where v must be 0
    again: it is not if a sub-layer gave something else the second time, or v took more than 53 bits. Those
    who defer their checks ask ``take_rebuild_failed``, which does not wait for the device; without that the
    backward pass raises RunError.

    Args:
        sublayers: L, of all blocks together.
        decay: ratio of a drift to the one before.
    """

    def __init__(self, sublayers: int, decay: float) -> None:
        super().__init__("trunk")
        self.drifts = drifts_of(sublayers, decay)
        self.kicks = kicks_of(self.drifts)
        self.rebuild_failed: Tensor | None = None

    # Its backward pass cannot be traced; ``LanguageModel.compile_features`` compiles the sub-layers.
    @torch.compiler.disable
    def forward(
        self,
        z: Tensor,
        blocks: Iterable[nn.Module],
        caches: Sequence[Any] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The state after all blocks, like z (..., D), in whose dtype each sub-layer sees it."""
        if not self.fallen_back:
            fixed = _FixedPoint(self, z)
            position, momentum = _Enter.apply(fixed, z)
            position, momentum, _ = through(TrunkState(position, momentum, fixed), blocks, caches, packing)
            return _Leave.apply(fixed, position, momentum)
        high = torch.promote_types(z.dtype, torch.float32)
        position = z.to(high)
        state = TrunkState(position, torch.zeros_like(position), _FloatingPoint(self, z.dtype))
        return through(state, blocks, caches, packing).position.to(z.dtype)

    def take_rebuild_failed(self) -> Tensor | None:
        """Whether a backward pass did not come back to where it began since the last call; on the device."""
        failed, self.rebuild_failed = self.rebuild_failed, None
        return failed


class _FloatingPoint:
    """Floating-point z and v, and sub-layers that are computed again in the backward pass."""

    def __init__(self, trunk: ReversibleTrunk, dtype: torch.dtype) -> None:
        self.schedule = zip(trunk.kicks, trunk.drifts, strict=True)
        self.dtype = dtype

    def step(self, sublayer: Sublayer, position: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        kick, drift = next(self.schedule)
        x = position.to(self.dtype)
        change = recomputed_call(sublayer, x) if torch.is_grad_enabled() else sublayer(x)
        momentum = momentum.add(change, alpha=kick)
        return position.add(momentum, alpha=drift), momentum


class _FixedPoint:
    """Whole numbers z and v, which are where the last sub-layer left them, or where the backward pass is.

    Autograd does not see them, but two tensors of their shape in their place, which hold no memory.

    Attributes:
        position: z, float64, in units of 1.
        momentum: v, float64, in units of 2^-FRACTION_BITS.
    """

    def __init__(self, trunk: ReversibleTrunk, z: Tensor) -> None:
        self.trunk = trunk
        self.dtype = z.dtype
        self.high = torch.promote_types(z.dtype, torch.float32)
        self.differentiable = torch.is_grad_enabled()
        # Sub-layers that have moved the state.
        self.done = 0
        self.position = _whole(z, 1.0).mul_(UNIT)
        self.momentum = torch.zeros_like(self.position)

    def step(self, sublayer: Sublayer, position: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        return _Step.apply(self, sublayer, position, momentum, *sublayer.parameters())

    def value(self) -> Tensor:
        """z in the dtype it came in."""
        return self.position.to(self.dtype, copy=True)

    def carrier(self) -> Tensor:
        """A tensor of the shape of z that holds one number, and is no view: FSDP2 would warn of one."""
        shape = self.position.shape
        return self.position.new_empty_strided(shape, [0] * len(shape), dtype=self.high)

    def kick(self, change: Tensor) -> None:
        """The kick and the drift of the next sub-layer."""
        self.momentum += _whole(change, self.trunk.kicks[self.done])
        self.position.add_(self._drift(self.done), alpha=UNIT)
        self.done += 1

    def undo_drift(self) -> None:
        """Of the last sub-layer: z is its input then."""
        self.done -= 1
        self.position.sub_(self._drift(self.done), alpha=UNIT)

    def undo_kick(self, change: Tensor) -> None:
        """Of the sub-layer whose drift was undone."""
        self.momentum -= _whole(change, self.trunk.kicks[self.done])

    def release(self) -> None:
        """Free the memory: the embedding's gradient, which comes now, is large."""
        self.position = self.momentum = self.position.new_empty(0)

    def _drift(self, number: int) -> Tensor:
        return torch.mul(self.momentum, self.trunk.drifts[number]).round_()


def _whole(x: Tensor, rate: float) -> Tensor:
    """x times a rate, in units and rounded to a whole number, float64."""
    return x.detach().to(torch.float64, copy=True).mul_(rate / UNIT).round_()


class _Enter(torch.autograd.Function):
    """From a state to that of the trunk."""

    @staticmethod
    def forward(ctx: Any, fixed: _FixedPoint, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.fixed = fixed
        return fixed.carrier(), fixed.carrier()

    @staticmethod
    def backward(ctx: Any, grad_position: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        fixed, trunk = ctx.fixed, ctx.fixed.trunk
        # What is not finite is told by the loss.
        failed = ((fixed.momentum > 0) | (fixed.momentum < 0)).any()
        fixed.release()
        if trunk.deferred:
            trunk.rebuild_failed = failed if trunk.rebuild_failed is None else trunk.rebuild_failed | failed
        elif failed:
            raise RunError(
                "the reversible trunk was not rebuilt to the last bit: its sub-layers gave other values in "
                "the backward pass than in the forward pass, or more than its numbers hold; weights and "
                "precision settings must not change in between; a larger stage.trunk_decay makes smaller "
                "numbers, stage.trunk=residual does without"
            )
        return None, grad_position.to(fixed.dtype)


class _Step(torch.autograd.Function):
    """One sub-layer, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        fixed: _FixedPoint,
        sublayer: Sublayer,
        position: Tensor,
        momentum: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.fixed, ctx.sublayer, ctx.number = fixed, sublayer, fixed.done
        ctx.surroundings = _Surroundings(position.device, sublayer.random)
        # As in the backward pass, because it decides which kernels run.
        with torch.set_grad_enabled(fixed.differentiable), recomputed_as_a_whole():
            change = sublayer(fixed.value().requires_grad_(fixed.differentiable))
        fixed.kick(change.detach())
        return fixed.carrier(), fixed.carrier()

    @staticmethod
    def backward(ctx: Any, grad_position: Tensor, grad_momentum: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a reversible trunk has no second derivative; stage.trunk=residual has")
        fixed, sublayer, number = ctx.fixed, ctx.sublayer, ctx.number
        if fixed.done != number + 1:
            raise RuntimeError(
                "a reversible trunk can be undone once; call the model again for another backward pass"
            )
        fixed.undo_drift()
        # In place: both were made for this sub-layer alone, by the next one or ``_Leave``.
        if grad_momentum is None:
            grad_momentum = grad_position * fixed.trunk.drifts[number]
        else:
            grad_momentum.add_(grad_position, alpha=fixed.trunk.drifts[number])
        with torch.enable_grad(), ctx.surroundings.again(), recomputed_as_a_whole():
            x = fixed.value().requires_grad_()
            change = sublayer(x)
        fixed.undo_kick(change.detach())
        edge, dtype = get_gradient_edge(change), change.dtype
        # Its memory is the gradient's from here on.
        del change
        grad_change = (grad_momentum * fixed.trunk.kicks[number]).to(dtype)
        wanted = [x, *sublayer.parameters()]
        grad_x, *gradients = torch.autograd.grad(edge, wanted, grad_change, allow_unused=True)
        return None, None, grad_position.add_(grad_x), grad_momentum, *gradients


class _Leave(torch.autograd.Function):
    """From the state of the trunk to z."""

    @staticmethod
    def forward(ctx: Any, fixed: _FixedPoint, position: Tensor, momentum: Tensor) -> Tensor:
        ctx.fixed = fixed
        return fixed.value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad.to(ctx.fixed.high, copy=True), None


class _Surroundings:
    """Autocast, and the random state where that matters, of a call that is to be made again."""

    def __init__(self, device: torch.device, random: bool) -> None:
        kind = device.type
        self.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        # Of another device than the state's no generator is put back, so none is set.
        self.gpu = device if kind == "cuda" else None
        self.random = torch_random_state(self.gpu) if random else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was."""
        gpus = [self.gpu] if self.gpu is not None else []
        with self.autocast, torch.random.fork_rng(gpus, enabled=self.random is not None):
            if self.random is not None:
                restore_torch_random_state(self.random, *gpus)
            yield
