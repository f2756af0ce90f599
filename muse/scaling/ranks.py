"""What ranks send each other in a training step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from muse.scaling.counts import Shape, Shapes

# A rank's gradients are summed in pieces of this many bytes by DDP, and in float32 by FSDP.
BUCKET_BYTES = 25 * 2**20
SUM_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a training step; it receives as much.

    Attributes:
        sent: bytes.
        collectives: collective operations.
        hops: messages that follow one another: around a ring, ranks - 1 for a gather or a scattered sum.
    """

    sent: float
    collectives: int
    hops: int


def padded(shape: Shape, ranks: int) -> int:
    """Numbers that FSDP gathers of a parameter: that many rows on each rank, the last ones empty.

    A planar parameter (2, n, ...) is split along the first axis after that of the planes which ranks divide,
    else along its first axis as all others are: two planes over 1,000 ranks are gathered as 1,000 planes.
    """
    divided = (axis for axis in range(1, len(shape)) if shape[0] == 2 and shape[axis] % ranks == 0)
    axis = next(divided, 0)
    return ranks * math.ceil(shape[axis] / ranks) * (math.prod(shape) // shape[axis])


def traffic(found: Shapes, size: int, parallel: str, ranks: int, accumulation: int = 1) -> Traffic:
    """Bytes and messages of a training step.

    DDP sums the gradients, ``size`` bytes each, in buckets: 2 (R - 1) / R of them. FSDP gathers each block
    before its forward pass and before its backward pass, and what is left once, for every micro-batch, and
    sums gradients in float32: (R - 1) / R of each. Scalars that ranks agree on are left out.

    Args:
        found: the parameters.
        size: bytes of a number.
        parallel: ``none``, ``ddp`` or ``fsdp``.
        ranks: R.
        accumulation: micro-batches of a step.
    """
    share = (ranks - 1) / ranks
    if parallel == "none" or ranks == 1:
        return Traffic(0.0, 0, 0)
    if parallel == "ddp":
        gradients = size * found.numbers
        buckets = math.ceil(gradients / BUCKET_BYTES)
        return Traffic(2 * share * gradients, buckets, 2 * buckets * (ranks - 1))
    block = sum(padded(shape, ranks) for shapes in found.blocks for shape in shapes)
    rest = sum(padded(shape, ranks) for shape in found.rest)
    sent = share * (accumulation * size * (2 * block + rest) + SUM_BYTES * (block + rest))
    collectives = accumulation * (2 * len(found.blocks) + 1) + len(found.blocks) + 1
    return Traffic(sent, collectives, collectives * (ranks - 1))
