"""How long a training step takes on many GPUs by the formulas, and which limit it meets."""

from __future__ import annotations

from dataclasses import dataclass

from muse.config import ModelConfig, StageConfig
from muse.scaling.counts import computed_again, forces, shapes, skips_first_kick, step_flops
from muse.scaling.memory import Memory, element_bytes, memory
from muse.scaling.ranks import padded, traffic

# What a force costs on a GPU (kernels/symplectic): each float32 product is three in TF32.
TF32_PRODUCTS = 3
# Gathered numbers beyond the parameters from which on sharding is called uneven.
UNEVEN = 1.1


@dataclass(frozen=True)
class Machine:
    """The GPUs and what joins them.

    Attributes:
        memory: bytes of a card.
        peak: FLOPs a second of bfloat16 products.
        peak_fp32: of float32 products, as ``hardware=cuda`` takes them (TF32).
        utilisation: share of both that the products of a step reach.
        link: bytes a second that a card sends inside its node.
        network: bytes a second for each card between nodes.
        node: cards in a node.
        latency: seconds of a message.
    """

    memory: float
    peak: float
    peak_fp32: float
    utilisation: float
    link: float
    network: float
    node: int
    latency: float


# From data sheets, dense products: NVIDIA H100 and H200 SXM, 80 and 141 GB, 989 TFLOPS bfloat16, 494 TFLOPS
# TF32, NVLink 900 GB/s for both directions together.
CARDS = {
    card: {"memory_gb": gigabytes, "peak_tflops": 989.0, "peak_tflops_fp32": 494.0, "link_gbs": 450.0}
    for card, gigabytes in (("h100", 80.0), ("h200", 141.0))
}


@dataclass(frozen=True)
class Prediction:
    """A training step on a number of ranks.

    Attributes:
        ranks: how many.
        windows: on each, in a micro-batch.
        tokens: of the whole step.
        memory: on a rank.
        flops: of a rank.
        sent: bytes that a rank sends.
        compute: seconds of the products.
        communication: seconds of what ranks send.
        limits: what does not work, the worst first.
    """

    ranks: int
    windows: float
    tokens: int
    memory: Memory
    flops: float
    sent: float
    compute: float
    communication: float
    limits: tuple[str, ...]

    @property
    def hidden(self) -> float:
        """Seconds of the step where all communication runs beside products."""
        return max(self.compute, self.communication)

    @property
    def apart(self) -> float:
        """Seconds of the step where none does."""
        return self.compute + self.communication


def predict(
    stage: StageConfig,
    model: ModelConfig,
    batch_size: int,
    accumulation: int,
    parallel: str,
    ranks: int,
    machine: Machine,
    device: str = "cuda",
    kept: float = 1.0,
) -> Prediction:
    """A training step of ``accumulation`` micro-batches of ``batch_size`` windows, shared by the ranks.

    Compute: FLOPs of the products in each precision / (its peak x utilisation). Communication: bytes / the
    slowest link of a ring, and its messages x latency. All that is no product is in the utilisation. A step
    learns from a share ``kept`` of the tokens.
    """
    vocab, length = model.vocab_size, model.seq_len
    parallel = parallel if ranks > 1 else "none"
    windows = batch_size / ranks
    shared = batch_size % ranks == 0
    held = memory(stage, model, vocab, length, max(1, round(windows)), device, parallel, ranks, accumulation)
    flops = step_flops(stage, model, vocab, length, kept)
    tokens = windows * length * accumulation
    of_forces = machine.peak_fp32 / TF32_PRODUCTS if stage.force_precision == "fp32" else machine.peak
    others = machine.peak_fp32 if stage.precision == "fp32" else machine.peak
    again = _products_again(stage) if device == "cuda" and stage.gradient in ("exact", "reversible") else 1.0
    seconds = again * flops.forces / of_forces + (flops.total - flops.forces) / others
    compute = tokens * seconds / machine.utilisation
    found = shapes(stage, model, vocab)
    sent = traffic(found, element_bytes(stage), parallel, ranks, accumulation)
    bandwidth = machine.link if ranks <= machine.node else machine.network
    communication = sent.sent / bandwidth + sent.hops * machine.latency
    whole = found.numbers
    gathered = sum(padded(shape, ranks) for group in (*found.blocks, found.rest) for shape in group)
    limits = (
        ("batch", not shared),
        ("memory", held.peak > machine.memory),
        ("uneven shards", parallel == "fsdp" and gathered > UNEVEN * whole),
        ("communication", communication > compute),
    )
    return Prediction(
        ranks,
        windows,
        batch_size * accumulation * length,
        held,
        tokens * flops.total,
        sent.sent,
        compute,
        communication,
        tuple(name for name, met in limits if met),
    )


def _products_again(stage: StageConfig) -> float:
    """How many products a GPU takes for one of a CPU.

    The backward pass computes W1 q and W1 y again for the parameters' gradients, 11 products a force in all
    instead of 8; the kick that is not undone has 2 of them, on a CPU 1. Where blocks are computed again, both
    take 2 more.
    """
    count, skipped, again = forces(stage), skips_first_kick(stage), 2 * computed_again(stage)
    return ((11 + again) * count - 2 * skipped) / ((8 + again) * count - skipped)
