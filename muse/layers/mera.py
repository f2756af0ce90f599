"""A dyadic tree over the tokens, and a router that reads it: a causal mixer whose state grows as log S."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.planar import conjugate, multiply, upcast
from kernels.products import linear, matmul
from muse.layers.activation import SplitGELU
from muse.layers.linear import ComplexLinear

# Nodes of a level that a token reads: the newest finished one and the one before. What a level's newest two
# leave out, those of the next one hold.
READ = 2
# Tokens that read by one matrix product.
BLOCK = 16
# Standard deviation of the disentanglers' first angles, which are the identity at 0.
TANGLED = 0.1


@dataclass
class LevelState:
    """What one level of a tree keeps of its nodes, all planar (B, H, nodes, 2, d) and at least in float32.

    Attributes:
        pending: those that no node of the next level holds yet: of a pair the first, which is disentangled,
            and the second, where it is there.
        recent: the last READ.
        count: nodes so far.
    """

    pending: Tensor
    recent: Tensor
    count: int = 0


@dataclass
class MeraState:
    """What one router knows of the tokens that it has seen.

    Attributes:
        levels: those that have a node, the tokens themselves first.
        length: tokens seen.
    """

    levels: list[LevelState] = field(default_factory=list)
    length: int = 0


def levels_read(model: nn.Module) -> dict[str, float]:
    """How much of what each router of a model read in its last call in evaluation mode was of which level.

    As ``mera/blocks_1_mixer/level_3``, the router's name without its dots and a level that holds 2^3 tokens
    a node: mean weight over tokens and heads. They sum to 1.
    """
    metrics = {}
    for name, router in routers_of(model).items():
        read = [] if router.level_weights is None else router.level_weights.tolist()
        for level, weight in enumerate(read):
            metrics[f"mera/{name.replace('.', '_')}/level_{level}"] = weight
    return metrics


def routers_of(model: nn.Module) -> dict[str, MeraRouter]:
    """Every router of a model by its name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MeraRouter)}


def newest(position: Tensor, level: Tensor) -> Tensor:
    """The last node of a level that holds no token after a position; negative where there is none.

    Node k of level l is made of tokens up to 2^l k + 2^(l+1) - 2: of its own 2^l, and through the
    disentanglers of all but one of as many after these.
    """
    return ((position + 2) >> level) - 2


def nodes_of(length: int, level: int) -> int:
    """Nodes of a level that so many tokens have."""
    return max(0, ((length + 1) >> level) - 1)


def deepest(length: int) -> int:
    """The last level of which a token after so many others ends a node; -1 if there are -1."""
    place = length + 2
    return min((place & -place).bit_length() - 1, place.bit_length() - 2)


def reached(length: int, levels: int) -> int:
    """The last of so many levels that has a node once there are ``length`` tokens."""
    return min(levels, (length + 1).bit_length() - 2)


def read_shape(length: int, levels: int) -> tuple[int, int]:
    """Of ``length`` tokens, two or more: blocks that read, and nodes that each of them may read."""
    there = range(reached(length, levels) + 1)
    return (length + 1) // BLOCK + 1, sum(_nodes(level, BLOCK) for level in there)


def _nodes(level: int, block: int) -> int:
    """Nodes of a level that a block of tokens may read."""
    return max(block >> level, 1) + READ - 1


class MeraRouter(nn.Module):
    """Sums of the past at every scale, of which each token weighs what it reads, in place of attention.

    Of normalised states z_t it takes leaves x_t = W_x z_t, nodes of level 0. From level to level, with
    angles for each channel and level,

        (x'_(2k+1), x'_(2k+2)) = U (x_(2k+1), x_(2k+2))       a disentangler, between neighbouring pairs
        y_k = e^(i a) cos(phi) x'_(2k) + e^(i b) sin(phi) x'_(2k+1)      an isometry, from a pair to a node
        U = [[cos(theta), e^(i g) sin(theta)], [-e^(-i g) sin(theta), cos(theta)]]

    U is unitary but for phases of its rows, which a and b are; x'_0 = x_0. Token t reads the two newest nodes
    of each level that hold nothing after it (``newest``), which together hold all of its past:

        y_t = W_out(sum_n w_tn x_n  GELU(c_t))       w_t = softmax(W_r z_t + b_r) over levels, for each head
        c_t = W_c z_t, GELU on each plane

    with a complex product in the last line. To build costs O(S), to read O(log S) a token, and so much is
    what it keeps when decoding. The network is the multi-scale entanglement renormalization ansatz (Vidal
    2007), here one of classical signals, as wavelets are (Evenbly and White 2016).

    Args:
        d_model: complex channels D.
        heads: groups of channels, each with weights of its own; must divide D.
        levels: above the tokens; nodes of the last one hold 2^levels of them, and what is beyond is not read.
        init: initialisation of the complex maps.
        gain: factor on the initial output map.
    """

    def __init__(
        self, d_model: int, heads: int, levels: int, init: str = "glorot", gain: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        # Two maps in one product, initialised as maps of D channels each.
        apart = math.sqrt(3 / 2) if init == "glorot" else 1.0
        self.projection = ComplexLinear(d_model, 2 * d_model, bias=False, init=init, gain=apart)
        # theta and g; phi, a and b.
        self.disentanglers = nn.Parameter(torch.empty(levels, 2 * d_model))
        self.isometries = nn.Parameter(torch.empty(levels, 3 * d_model))
        self.router = nn.Linear(2 * d_model, heads * READ * (levels + 1))
        self.activation = SplitGELU()
        self.output = ComplexLinear(d_model, d_model, bias=False, init=init, gain=gain)
        # Of the last call in evaluation mode: mean weight of each level that was there.
        self.level_weights: Tensor | None = None
        with torch.no_grad():
            nn.init.zeros_(self.router.bias)
            theta, g = self.disentanglers.chunk(2, -1)
            theta.normal_(std=TANGLED)
            g.uniform_(-math.pi, math.pi)
            phi, a, b = self.isometries.chunk(3, -1)
            phi.fill_(math.pi / 4)
            a.zero_()
            b.uniform_(-math.pi, math.pi)

    def new_cache(self, longest: int) -> MeraState:
        """A state that has seen no token; it grows by a level where the number of tokens doubles."""
        return MeraState()

    def forward(self, z: Tensor, cache: MeraState | None = None) -> Tensor:
        """Map planar (B, S, 2, D) to planar (B, S, 2, D).

        Args:
            z: states.
            cache: of the tokens before z, which takes in those of z. Decode without gradients.
        """
        leaves, gate = self.projection(z).chunk(2, dim=-1)
        start = 0 if cache is None else cache.length
        levels = self.tree(upcast(leaves.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)), cache)
        logits = linear(z.flatten(-2), self.router.weight, self.router.bias)
        positions = torch.arange(start, start + z.shape[1], device=z.device)
        weights = weights_of(logits.unflatten(-1, (self.heads, -1)), positions, len(levels))
        if not self.training:
            self.level_weights = weights.detach().unflatten(-1, (-1, READ)).sum(-1).mean((0, 1, 2))
        read = read_nodes(levels, weights.to(leaves.dtype), start)
        if cache is not None:
            cache.length += z.shape[1]
        return self.output(multiply(read.permute(0, 2, 3, 1, 4).flatten(-2), self.activation(gate)))

    def tree(self, nodes: Tensor, cache: MeraState | None = None) -> list[tuple[Tensor, int]]:
        """The nodes of every level that has one, and the number of the first of them.

        Args:
            nodes: of level 0, planar (B, H, S, 2, d).
            cache: of the tokens before, which takes in these. Its recent nodes come first, then.
        """
        turns, halves = self.turns(), self.halves()
        levels = []
        for level in range(self.levels + 1):
            if cache is None:
                levels.append((nodes, 0))
                pending = nodes
            else:
                if level == len(cache.levels):
                    none = nodes[:, :, :0].clone()
                    cache.levels.append(LevelState(none, F.pad(none, (0, 0, 0, 0, READ, 0))))
                kept = cache.levels[level]
                known = torch.cat((kept.recent, nodes), 2)
                levels.append((known, kept.count - READ))
                pending = torch.cat((kept.pending, nodes), 2)
                kept.recent, kept.count = known[:, :, -READ:].clone(), kept.count + nodes.shape[2]
            if level == self.levels:
                break
            nodes, pending = _coarser(pending, turns[level], halves[level])
            if cache is not None:
                kept.pending = pending
            if not nodes.shape[2] and (cache is None or level + 1 == len(cache.levels)):
                break
        return levels

    def turns(self) -> Tensor:
        """U of each level: its first row, planar (levels, 2 columns, H, 1, 2, d)."""
        theta, g = upcast(self.disentanglers).chunk(2, -1)
        return self._by_head(theta.cos(), torch.zeros_like(g), theta.sin(), g)

    def halves(self) -> Tensor:
        """What the isometries of each level multiply the two nodes of a pair by, laid out as ``turns``."""
        phi, a, b = upcast(self.isometries).chunk(3, -1)
        return self._by_head(phi.cos(), a, phi.sin(), b)

    def _by_head(self, *polar: Tensor) -> Tensor:
        """Two complex numbers a level and channel, of moduli and angles (levels, D) in turn."""
        pairs = [
            torch.stack((size * angle.cos(), size * angle.sin()), 1)
            for size, angle in zip(polar[::2], polar[1::2], strict=True)
        ]
        return torch.stack(pairs, 1).unflatten(-1, (self.heads, -1)).transpose(2, 3).unsqueeze(3)


def weights_of(logits: Tensor, positions: Tensor, levels: int) -> Tensor:
    """What tokens weigh nodes by: (B, H, S, READ * levels), at least in float32, a level's newest node first.

    Args:
        logits: of the router, (B, S, H, READ * levels or more).
        positions: of the tokens, (S,) or (B, 1, S).
        levels: that are read.
    """
    level, before = _slots(levels, logits.device)
    missing = newest(positions[..., None], level) < before
    logits = upcast(logits[..., : READ * levels].transpose(1, 2))
    return logits.masked_fill(missing, -math.inf).softmax(-1)


def _slots(levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Level of each node that a token reads, and its distance from the newest one there."""
    slots = torch.arange(READ * levels, device=device)
    return slots // READ, slots % READ


def _coarser(nodes: Tensor, turn: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of the next level, and what these do not hold.

    Args:
        nodes: planar (B, H, n, 2, d), the first one as disentanglers leave it; (n - 1) // 2 pairs are whole.
        turn: of ``MeraRouter.turns``.
        half: of ``MeraRouter.halves``.
    """
    pairs = (nodes.shape[2] - 1) // 2
    if pairs < 1:
        return nodes[:, :, :0], nodes
    left, right = disentangled(nodes[:, :, 1 : 2 * pairs : 2], nodes[:, :, 2 : 2 * pairs + 1 : 2], turn)
    first = torch.cat((nodes[:, :, :1], right[:, :, :-1]), 2)
    made = multiply(half[0], first) + multiply(half[1], left)
    return made, torch.cat((right[:, :, -1:], nodes[:, :, 2 * pairs + 1 :]), 2)


def disentangled(left: Tensor, right: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """U of two planar tensors, ``turn`` its first row."""
    along, across = turn
    return (
        multiply(along, left) + multiply(across, right),
        multiply(along, right) - multiply(conjugate(across), left),
    )


def read_nodes(levels: list[tuple[Tensor, int]], weights: Tensor, start: int) -> Tensor:
    """The weighted sum of what each token reads, planar (B, H, S, 2, d), by a product for each block.

    Args:
        levels: nodes of each level, planar (B, H, n, 2, d), and the number of the first one.
        weights: (B, H, S, READ * levels).
        start: position of the first token.
    """
    length = weights.shape[2]
    block = 1 if length == 1 else BLOCK
    # Blocks of positions plus 2, by which ``newest`` shifts them.
    first, last = (start + 2) // block, (start + length + 1) // block
    count = last - first + 1
    parts, columns = [], []
    for level, (nodes, lowest) in enumerate(levels):
        step, groups, times = block >> level, count, 1
        if not step:
            # As many blocks read the same two.
            step, times = 1, (1 << level) // block
            groups = last // times - first // times + 1
        front = lowest + 3 - (first * block >> level)
        wanted = groups * step + READ - 1
        nodes = F.pad(nodes, (0, 0, 0, 0, front, wanted - front - nodes.shape[2]))
        own = nodes[:, :, : groups * step].unflatten(2, (groups, step)), nodes[:, :, step::step, None]
        parts += [_repeated(part, times, first % times, count) for part in own]
        columns.append(step + 1)
    table = torch.cat(parts, 3).flatten(-2).to(weights.dtype)
    of_level, before = _slots(len(levels), weights.device)
    offset = torch.tensor([sum(columns[:number]) for number in range(len(levels))], device=weights.device)
    own_node = torch.arange(block, device=weights.device)[:, None] >> of_level
    place = offset[of_level] + 1 - before + own_node
    front = start + 2 - first * block
    weights = F.pad(weights, (0, 0, front, count * block - front - length)).unflatten(2, (count, block))
    spread = weights.new_zeros(*weights.shape[:-1], sum(columns))
    spread = spread.scatter(-1, place.expand(weights.shape), weights)
    out = matmul(spread, table).flatten(2, 3)[:, :, front : front + length]
    return out.unflatten(-1, (2, -1))


def _repeated(groups: Tensor, times: int, skipped: int, count: int) -> Tensor:
    """Each of the groups (B, H, groups, ...) so many times, of which ``count`` after those skipped."""
    if groups.shape[2] == 1:
        return groups.expand(-1, -1, count, *groups.shape[3:])
    if times == 1:
        return groups
    return (
        groups.unsqueeze(3)
        .expand(*groups.shape[:3], times, *groups.shape[3:])
        .flatten(2, 3)[:, :, skipped : skipped + count]
    )
