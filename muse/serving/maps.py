"""The maps of decoders as inference needs them: real products on rows [re | im], in float32.

A complex map A + i B is the real one [[A, -B], [B, A]], which one product of a real library does; the gain of
a norm is in the weights of the maps that follow it. Heads have their real and imaginary parts next to each
other, so that rotary positions are one complex product. Widths to which a nonlinearity is applied are
multiples of LANES, with zeros behind: the last numbers of a tensor are else computed by other code than the
others, and a row had other bits where it is last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.complex_activation import complex_activation
from kernels.complex_linear.plain import real_form
from kernels.complex_scan import complex_scan
from kernels.planar import conjugate, multiply
from kernels.symplectic.plain import slope_of
from muse.dynamics import DuffingPotential, HamiltonianNeuralODE, MLPPotential
from muse.errors import ConfigError
from muse.layers import (
    ComplexAttention,
    ComplexFFN,
    ComplexLayerNorm,
    ComplexRMSNorm,
    KoopmanOperator,
    MeraRouter,
    MeraState,
)
from muse.layers.koopman import TAPS
from muse.layers.mera import LevelState, deepest, newest, nodes_of, reached, read_nodes, weights_of
from muse.models.hamiltonian import HamiltonianFlow
from muse.models.integrated import MixerSum
from muse.models.real import RealAttention, RealFFN
from muse.models.transformer import TransformerAttention
from muse.serving.slots import Kept, KeysAndValues, Observables, Pass, Trees

LANES = 16


class Map(Protocol):
    """What a sub-layer adds to the state."""

    def new_kept(self, slots: int, window: int) -> Kept | None:
        """Memory for what it keeps of the tokens before; None where it keeps nothing."""

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        """Add ``factor`` times the map of normalised rows, in place."""


@dataclass
class Norm:
    """A norm without its gain, and the gain.

    Attributes:
        of: maps rows to normalised rows.
        gain: complex (2, D) or real (F,), that the maps which follow have in their weights; None for none.
    """

    of: Callable[[Tensor], Tensor]
    gain: Tensor | None = None

    def folded(self, weight: Tensor) -> Tensor:
        """A weight (out, F) on normalised rows, as one on rows that ``of`` gives."""
        if self.gain is None:
            return weight
        gain = self.gain.to(weight)
        if gain.dim() == 1:
            return weight * gain
        on_re, on_im = weight.chunk(2, 1)
        return torch.cat((on_re * gain[0] + on_im * gain[1], on_im * gain[0] - on_re * gain[1]), 1)

    def applied(self, rows: Tensor) -> Tensor:
        """Rows that ``of`` gives, times the gain."""
        if self.gain is None:
            return rows
        if self.gain.dim() == 1:
            return rows * self.gain
        re, im = rows.chunk(2, 1)
        g_re, g_im = self.gain
        return torch.cat(((re * g_re).addcmul_(im, g_im, value=-1), (re * g_im).addcmul_(im, g_re)), 1)


def norm_of(norm: nn.Module) -> Norm:
    """The norm of a model.

    Raises:
        ConfigError: it is of an unknown kind.
    """
    if isinstance(norm, ComplexRMSNorm):
        return Norm(_root_mean_square(norm.gain.shape[1], norm.eps), _float(norm.gain))
    if isinstance(norm, nn.RMSNorm):
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return Norm(_root_mean_square(norm.normalized_shape[0], eps), _float(norm.weight))
    if isinstance(norm, ComplexLayerNorm):
        whitening = ComplexLayerNorm(norm.beta.shape[1], norm.eps).to(norm.beta.device)
        whitening.load_state_dict(norm.state_dict())
        return Norm(lambda x: whitening(x.unflatten(1, (2, -1))).flatten(1))
    if isinstance(norm, nn.LayerNorm):
        weight, bias = _float(norm.weight), _float(norm.bias)
        return Norm(lambda x: F.layer_norm(x, x.shape[1:], weight, bias, norm.eps))
    raise _unknown(norm)


def _root_mean_square(channels: int, eps: float) -> Callable[[Tensor], Tensor]:
    def of(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x * (length * length).mul_(1 / channels).add_(eps).rsqrt_()

    return of


def maps_of(module: nn.Module, norm: Norm) -> list[Map]:
    """The maps whose sum a sub-layer of a model adds.

    Args:
        module: of the model.
        norm: of its input.

    Raises:
        ConfigError: it is of an unknown kind.
    """
    if isinstance(module, ComplexAttention | RealAttention | TransformerAttention):
        return [Attention(module, norm)]
    if isinstance(module, MixerSum):
        return [one for mixer in module.children() for one in maps_of(mixer, norm)]
    if isinstance(module, KoopmanOperator):
        return [Koopman(module, norm)]
    if isinstance(module, MeraRouter):
        return [Mera(module, norm)]
    if isinstance(module, ComplexFFN):
        return [FeedForward.of_complex(module, norm)]
    if isinstance(module, RealFFN):
        kind = "swiglu" if module.gated else "gelu"
        return [FeedForward.of_real(module.up, module.down, kind, norm)]
    if isinstance(module, HamiltonianFlow):
        return [Flow(module, norm)]
    raise _unknown(module)


class Attention:
    """Causal attention over what is kept of the tokens before."""

    def __init__(self, module: ComplexAttention | RealAttention | TransformerAttention, norm: Norm) -> None:
        projection, output = _precise(module.projection.weight), _precise(module.output.weight)
        self.heads, self.score, self.window = module.heads, "real", None
        self.kv_heads = module.heads if isinstance(module, TransformerAttention) else module.kv_heads
        every = self.heads + 2 * self.kv_heads
        if isinstance(module, ComplexAttention):
            self.score, self.window = module.score, module.window
            projection = real_form(projection).unflatten(0, (2, every, -1)).permute(1, 2, 0, 3).flatten(0, 2)
            output = real_form(output).unflatten(1, (2, self.heads, -1)).permute(0, 2, 3, 1).flatten(1)
        elif isinstance(module, RealAttention):
            projection = projection.unflatten(0, (every, 2, -1)).transpose(1, 2).flatten(0, 2)
            output = output.unflatten(1, (self.heads, 2, -1)).transpose(2, 3).flatten(1)
        self.width = len(projection) // every
        self.scale = (self.width / (2 if isinstance(module, ComplexAttention) else 1)) ** -0.5
        self.projection, self.output = _float(norm.folded(projection)), _float(output).t()
        biases = (module.projection.bias, module.output.bias)
        self.biases = [None if bias is None else _float(bias) for bias in biases]

    def new_kept(self, slots: int, window: int) -> KeysAndValues:
        return KeysAndValues(slots, window, self.kv_heads, self.width, self.projection.device)

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        assert isinstance(kept, KeysAndValues)
        before, after = self.biases
        every = F.linear(normal, self.projection, before).unflatten(1, (-1, self.width))
        if tokens.turns is not None:
            turned = every[:, : self.heads + self.kv_heads].unflatten(2, (-1, 2))
            torch.view_as_complex(turned).mul_(tokens.turns)
        kept.write(every[:, self.heads :], tokens)
        q = every[:, : self.heads].unflatten(0, (tokens.count, tokens.length)).transpose(1, 2)
        k, v = kept.read(tokens)
        if self.score == "real":
            out = F.scaled_dot_product_attention(
                q, k, v, tokens.mask, scale=self.scale, enable_gqa=self.heads != self.kv_heads
            )
        else:
            out = self._by_complex_scores(q, k, v, tokens.mask)
        into.addmm_(out.transpose(1, 2).reshape(len(into), -1), self.output, alpha=factor)
        if after is not None:
            into.add_(after, alpha=factor)

    def _by_complex_scores(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        group = self.heads // self.kv_heads
        q, k, v = (torch.view_as_complex(x.unflatten(3, (-1, 2))) for x in (q, k, v))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = (q * self.scale) @ k.mH
        weight = (s.abs() + mask).softmax(-1)
        weight = weight * s.sgn() if self.score == "phase" else weight.to(s.dtype)
        return torch.view_as_real(weight @ v).flatten(3)


class FeedForward:
    """down(activation(up x)).

    Args:
        up: (hidden, F).
        down: (F, hidden).
        activate: of hidden rows.
        biases: of both maps.
    """

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        activate: Callable[[Tensor], Tensor],
        biases: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.up, self.down, self.activate, self.biases = _float(up), _float(down).t(), activate, biases

    @classmethod
    def of_complex(cls, module: ComplexFFN, norm: Norm) -> FeedForward:
        """That of stage 1."""
        up = norm.folded(real_form(_precise(module.up.weight)))
        down = real_form(_precise(module.down.weight))
        activation = module.activation
        if activation.kind == "split_gelu":
            return cls(_wider(up, 0, 2), _wider(down, 1, 2), F.gelu)
        offset, slope = (
            None if part is None else _wider(_float(part), 0, 1)
            for part in (activation.bias, activation.slope)
        )

        def activate(hidden: Tensor) -> Tensor:
            z = complex_activation(hidden.unflatten(1, (2, -1)), activation.kind, offset, slope)
            return z.flatten(1)

        return cls(_wider(up, 0, 2), _wider(down, 1, 2), activate)

    @classmethod
    def of_real(cls, up: nn.Linear, down: nn.Linear, kind: str, norm: Norm) -> FeedForward:
        """That of stages 0 and 3a."""
        parts = 2 if kind == "swiglu" else 1
        biases = (
            None if up.bias is None else _wider(_float(up.bias), 0, parts),
            None if down.bias is None else _float(down.bias),
        )
        weight = _wider(norm.folded(_precise(up.weight)), 0, parts)
        return cls(weight, _wider(_precise(down.weight), 1, 1), _swiglu if parts == 2 else F.gelu, biases)

    def new_kept(self, slots: int, window: int) -> None:
        return None

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        before, after = self.biases
        into.addmm_(self.activate(F.linear(normal, self.up, before)), self.down, alpha=factor)
        if after is not None:
            into.add_(after, alpha=factor)


def _swiglu(hidden: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, 1)
    return F.silu(gate).mul_(value)


class Flow:
    """What Hamiltonian flows change of (q, p) = (re, im), in floating point."""

    def __init__(self, module: HamiltonianFlow, norm: Norm) -> None:
        self.norm = norm
        self.flows = []
        for ode in module.odes:
            assert isinstance(ode, HamiltonianNeuralODE)
            self.flows.append((_kick_of(ode.potential), ode.stages))

    def new_kept(self, slots: int, window: int) -> None:
        return None

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        start = self.norm.applied(normal)
        q, p = start.chunk(2, 1)
        for number, (kick_of, stages) in enumerate(self.flows):
            if number:
                q, p = -p, q
            q, p = q.clone(memory_format=torch.contiguous_format), p.clone()
            kick = kick_of(q, p)
            for strength, drift in zip(stages.kicks, stages.drifts, strict=True):
                if strength:
                    kick(q, p, strength)
                if drift:
                    q.add_(p, alpha=drift)
        # As many turns back.
        for _ in self.flows[1:]:
            q, p = p, -q
        into.add_(torch.cat((q, p), 1).sub_(start), alpha=factor)


# p += strength F(q), in place, of tokens whose flow starts at (q, p).
Kick = Callable[[Tensor, Tensor, float], object]


def _kick_of(potential: nn.Module) -> Callable[[Tensor, Tensor], Kick]:
    if isinstance(potential, DuffingPotential):
        stiffness, quartic = _float(potential.stiffness), _float(potential.quartic).abs()

        def spring(q: Tensor, p: Tensor, strength: float) -> None:
            p.addcmul_(q, q.square().mul_(quartic).add_(stiffness), value=-strength)

        return lambda q, p: spring
    if not isinstance(potential, MLPPotential):
        raise _unknown(potential)
    w1, b1, w2 = (_wider(_precise(x), 0, 1) for x in (potential.w1, potential.b1, potential.w2))
    outward = _float(-w2.abs().unsqueeze(1) * w1)
    inward, bias = _float(w1).t(), _float(b1)
    context = _float(_wider(_precise(potential.context_weight), 0, 1)) if potential.with_context else None

    def start(q: Tensor, p: Tensor) -> Kick:
        shift = bias if context is None else F.linear(torch.cat((q, p), 1), context, bias)

        def kick(q: Tensor, p: Tensor, strength: float) -> None:
            slope = slope_of(torch.addmm(shift, q, inward), potential.phi)
            p.addmm_(slope, outward, alpha=strength)
            if potential.confinement:
                p.add_(q, alpha=-strength * potential.confinement)

        return kick

    return start


class Koopman:
    """An operator's observables, moved by one token at a time, or by a piece of a prompt."""

    def __init__(self, module: KoopmanOperator, norm: Norm) -> None:
        channels = module.observables
        self.channels = channels
        self.projection = _float(norm.folded(_gated(module.projection.weight)))
        self.rate, self.rate_bias = None, None
        if module.rate is not None:
            self.rate = _float(norm.folded(_precise(module.rate.weight)))
            self.rate_bias = _float(module.rate.bias)
        self.fastest = module.eigenvalues(1.0)[0].detach().float()
        self.angle = _float(module.theta)
        self.turn = torch.polar(torch.ones_like(self.angle), self.angle)
        # Of [re | im], a row for each tap.
        self.taps = _float(module.taps).t().repeat(1, 2)
        self.output = _float(real_form(_precise(module.output.weight))).t()

    def new_kept(self, slots: int, window: int) -> Observables:
        return Observables(slots, self.channels, TAPS - 1, self.projection.device)

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        assert isinstance(kept, Observables)
        shape = tokens.count, tokens.length
        u, gate = F.linear(normal, self.projection).chunk(2, 1)
        padded = torch.cat((kept.recent[tokens.slots], u.unflatten(0, shape)), 1)
        u = sum(tap * padded[:, at : at + tokens.length] for at, tap in enumerate(self.taps))
        assert isinstance(u, Tensor)
        log_decay = self._log_decay(normal).unflatten(0, shape)
        before = kept.state[tokens.slots]
        if tokens.length == 1:
            decay, scale = log_decay[:, 0].exp(), torch.expm1(2 * log_decay[:, 0]).neg_().sqrt_()
            after = g = before * decay * self.turn + torch.complex(*(scale * x for x in u[:, 0].chunk(2, 1)))
        else:
            state = torch.stack((before.real, before.imag), 1)
            moved, last = complex_scan(u.unflatten(2, (2, -1)), log_decay, self.angle, state)
            g, after = (torch.complex(x.select(-2, 0), x.select(-2, 1)) for x in (moved, last))
        kept.write(tokens, after, padded[:, tokens.length :])
        _add_gated(into, g.flatten(0, -2), gate, self.output, factor)

    def _log_decay(self, normal: Tensor) -> Tensor:
        if self.rate is None:
            return (0.5 * self.fastest).expand(len(normal), -1)
        return self.fastest * torch.sigmoid(F.linear(normal, self.rate, self.rate_bias))


class Mera:
    """A router's tree, grown by one token at a time, or by a piece of a prompt, and what is read of it."""

    def __init__(self, module: MeraRouter, norm: Norm) -> None:
        self.module, self.heads = module, module.heads
        self.channels = module.output.weight.shape[-1]
        self.projection = _float(norm.folded(_gated(module.projection.weight)))
        self.router = _float(norm.folded(_precise(module.router.weight)))
        self.router_bias = _float(module.router.bias)
        self.output = _float(real_form(_precise(module.output.weight))).t()
        (one, two), (along, across) = (
            _precise(pair).transpose(0, 1).squeeze(3).transpose(2, 3).flatten(3)
            for pair in (module.halves(), module.turns())
        )
        made = one, multiply(two, along), multiply(two, across)
        first = torch.zeros_like(one), -conjugate(across), along
        # Of a level's first, the node after it and the newest one to the node that they make and to the next
        # first, all [re | im]: (levels, 4, 6, channels).
        self.coarser = _float(torch.cat([_real_rows(made), _real_rows(first)], 1))

    def new_kept(self, slots: int, window: int) -> Trees:
        levels = reached(window, self.module.levels) + 1
        return Trees(slots, levels, self.channels, self.projection.device)

    def add(self, into: Tensor, normal: Tensor, tokens: Pass, kept: Kept | None, factor: float) -> None:
        assert isinstance(kept, Trees)
        leaves, gate = F.linear(normal, self.projection).chunk(2, 1)
        logits = F.linear(normal, self.router, self.router_bias).unflatten(1, (self.heads, -1))
        read = self._read_one if tokens.length == 1 else self._read_piece
        rows = read(leaves, logits, tokens, kept)
        _add_gated(into, torch.complex(*rows.chunk(2, 1)), gate, self.output, factor)

    def _read_one(self, leaves: Tensor, logits: Tensor, tokens: Pass, kept: Trees) -> Tensor:
        """What one token of each sequence reads, rows."""
        self._grow(leaves, tokens, kept)
        recent = kept.recent[tokens.slots]
        weights = weights_of(logits[:, None], tokens.positions[:, None, None], recent.shape[1])
        nodes = recent.view(tokens.count, -1, 2, self.heads, self.channels // self.heads)
        return (weights.permute(0, 3, 2, 1).unsqueeze(4) * nodes).sum(1).flatten(1)

    def _grow(self, leaves: Tensor, tokens: Pass, kept: Trees) -> None:
        """Take in a token of each sequence, and the nodes of other levels that it ends."""
        recent, first = kept.recent[tokens.slots], kept.first[tokens.slots]
        levels = min(max(0, *map(deepest, tokens.starts)) + 1, recent.shape[1])
        nodes, firsts = [leaves], []
        for level in range(levels - 1):
            three = torch.cat((first[:, level], recent[:, level, 0], nodes[level]), 1)
            coarser = self.coarser[level] * three.view(tokens.count, 1, 6, self.channels)
            made, after = coarser.sum(2).flatten(1).chunk(2, 1)
            nodes.append(made)
            firsts.append(after)
        # Where a node of the last level ends a pair, nothing is made of it.
        firsts.append(nodes[-1])
        every = torch.arange(levels, device=leaves.device)
        position = tokens.positions[:, None]
        count = newest(position - 1, every).add_(1).clamp_(min=0).unsqueeze(2)
        ended = tokens.live.unsqueeze(2) & (newest(position, every).unsqueeze(2) == count)
        new, recent, first = torch.stack(nodes, 1), recent[:, :levels], first[:, :levels]
        after = torch.where(count == 0, new, torch.stack(firsts, 1))
        first.copy_(torch.where(ended & (count % 2 == 0), after, first))
        moved = torch.cat((new.unsqueeze(2), recent[:, :, :-1]), 2)
        recent.copy_(torch.where(ended.unsqueeze(3), moved, recent))

    def _read_piece(self, leaves: Tensor, logits: Tensor, tokens: Pass, kept: Trees) -> Tensor:
        """What neighbouring tokens of one sequence read, rows."""
        (start,) = tokens.starts
        recent, first = kept.recent[tokens.slots][0], kept.first[tokens.slots][0]
        state = MeraState(length=start)
        for level in range(len(recent)):
            if not (there := nodes_of(start, level)):
                break
            known, pending = self._nodes_of(recent[level].flip(0)), self._nodes_of(first[level, None])
            if there % 2 == 0:
                pending = torch.cat((pending, known[:, :, -1:]), 2)
            state.levels.append(LevelState(pending, known, there))
        levels = self.module.tree(self._nodes_of(leaves), state)
        for level, own in enumerate(state.levels):
            recent[level] = self._rows_of(own.recent).flip(0)
            # None where nothing is made of them.
            first[level, None][: own.pending.shape[2]] = self._rows_of(own.pending[:, :, :1])
        weights = weights_of(logits[None], tokens.positions, len(levels))
        return self._rows_of(read_nodes(levels, weights, start))

    def _nodes_of(self, rows: Tensor) -> Tensor:
        """Planar (1, heads, nodes, 2, channels of a head)."""
        return rows.unflatten(1, (2, self.heads, -1)).permute(2, 0, 1, 3).unsqueeze(0)

    def _rows_of(self, nodes: Tensor) -> Tensor:
        return nodes[0].permute(1, 2, 0, 3).flatten(1)


def _real_rows(factors: Sequence[Tensor]) -> Tensor:
    """Of planar factors (levels, 2, channels), what sums of products with them are as real ones.

    Rows (levels, [re | im], [re | im] of each, channels).
    """
    return torch.cat([torch.stack((conjugate(factor), factor.flip(1)), 1) for factor in factors], 2)


def _gated(weight: Tensor) -> Tensor:
    """A planar complex weight to [u | gate] as a real one to [u re | u im | gate re | gate im]."""
    rows = real_form(_precise(weight))
    return rows.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)


def _add_gated(into: Tensor, z: Tensor, gate: Tensor, output: Tensor, factor: float) -> None:
    """Add the map of complex z, by GELU on each plane of rows of a gate."""
    gated = z * torch.complex(*F.gelu(gate).chunk(2, 1))
    into.addmm_(torch.cat((gated.real, gated.imag), 1), output, alpha=factor)


def _wider(weight: Tensor, axis: int, parts: int) -> Tensor:
    """With zeros behind each of so many parts of an axis, so that it is a multiple of LANES."""
    missing = -(weight.shape[axis] // parts) % LANES
    if not missing:
        return weight
    pieces = weight.chunk(parts, axis)
    shape = list(pieces[0].shape)
    shape[axis] = missing
    return torch.cat([part for piece in pieces for part in (piece, weight.new_zeros(shape))], axis)


def _precise(parameter: Tensor) -> Tensor:
    """For products of weights."""
    return parameter.detach().double()


def _float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def _unknown(module: nn.Module) -> ConfigError:
    name = type(module).__name__
    return ConfigError(f"a model with a {name} cannot be served: nothing is known of its states")


def mask_of(positions: Tensor, keys: int, window: int | None = None) -> Tensor:
    """0 for the keys that each position sees, itself the last of ``window``, else -inf: (positions, keys)."""
    key, own = torch.arange(keys, device=positions.device), positions[:, None]
    seen = key <= own
    if window is not None:
        seen &= key > own - window
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)
