"""Bytes that a training step takes on one rank, by what holds them, from formulas."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.adamw.eager import CHUNK as ADAMW_CHUNK
from muse.config import ModelConfig, StageConfig
from muse.dynamics.integrators import stages
from muse.dynamics.potential import CHUNK
from muse.errors import ConfigError
from muse.models.hamiltonian import hidden_units
from muse.models.loss import CHUNK_ELEMENTS, SOFTMAX_ELEMENTS
from muse.scaling.counts import (
    check_modelled,
    computed_again,
    forces,
    segments,
    shapes,
    swiglu_units,
    width_of,
)
from muse.scaling.ranks import padded

BYTES = {"fp32": 4, "bf16": 2}
# Scores of a block that eager attention on a CPU holds at most, or those of 64 queries if these are more; and
# how many tensors of them its backward pass holds at a time (kernels/complex_attention).
EAGER_SCORES, EAGER_QUERIES, EAGER_TENSORS = 1 << 21, (64, 256), 4
# Windows on a CPU that are short enough to keep all scores of (kernels/complex_attention).
HELD_KEYS = 256


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps.

    Attributes:
        attention: of a token and block, by the attention and its norm.
        feed: of a token and block, by the feed-forward map or the flows, and their norm.
        end: of a token, behind the blocks: the last norm and the features.
        table: of a block, whatever the number of windows: rotary angles, a mask of scores.
    """

    attention: float
    feed: float
    end: float
    table: float

    @property
    def layer(self) -> float:
        """Of a token and block."""
        return self.attention + self.feed


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: as the optimiser holds them, a part of each with ``fsdp``.
        optimiser: AdamW's two moments, in the dtype of the parameters.
        gradients: of all parameters held, when the backward pass has ended.
        activations: what the forward pass keeps up to the loss.
        gathered: whole parameters of FSDP: what belongs to no block, and two blocks.
        temporaries: what else is alive at the peak, gradients included as far as they are there by then.
        peak: sum of all but ``gradients``.
    """

    parameters: float
    optimiser: float
    gradients: float
    activations: float
    gathered: float
    temporaries: float

    @property
    def peak(self) -> float:
        """Largest sum at any time of the step."""
        return self.parameters + self.optimiser + self.activations + self.gathered + self.temporaries


def element_bytes(stage: StageConfig) -> int:
    """Bytes of a stored number.

    Raises:
        ConfigError: a mixed precision, whose activations have no single dtype, mixer=none, loops, Koopman
            operators, MERA routers, an antithesis, or checkpoints within checkpoints, some of which wait for
            Python's garbage collector.
    """
    check_modelled(stage)
    if stage.precision not in BYTES:
        raise ConfigError(
            f"stage.precision={stage.precision} has no memory model; choose one of {', '.join(BYTES)}"
        )
    if stage.mixer == "none":
        raise ConfigError("stage.mixer=none has no memory model; choose stage.mixer=attention")
    if stage.loops > 1:
        raise ConfigError(f"stage.loops={stage.loops} has no memory model; choose stage.loops=1")
    if stage.koopman != "none":
        raise ConfigError(f"stage.koopman={stage.koopman} has no memory model; choose stage=2")
    if stage.mera != "none":
        raise ConfigError(f"stage.mera={stage.mera} has no memory model; choose stage=2")
    if stage.dialectic != "none":
        raise ConfigError(
            f"stage.dialectic={stage.dialectic} has no memory model; choose stage.dialectic=none"
        )
    if stage.flowing and stage.gradient == "checkpoint" and stage.recompute == "block":
        raise ConfigError(
            "stage.gradient=checkpoint has no memory model with stage.recompute=block; choose "
            "stage.gradient=exact"
        )
    return BYTES[stage.precision]


def activation_bytes(stage: StageConfig, model: ModelConfig, seq_len: int, device: str) -> Activations:
    """What autograd keeps of a token, by the tensors that the backward pass of each operation asks for.

    Of blocks that ``trunk`` or ``recompute`` compute again, it keeps that in the backward pass only.

    b bytes a number, k = kv_heads / heads, statistics of norms and softmax in float32.

    - Stage 1, a block: the state before each norm, the norm before attention and that before the feed-forward
      map, q, k, v and the attended values, each of 2 D numbers, and the hidden channels: 2 D (6 + 2 k) + 2 F.
      Fused attention keeps its output a second time, (B, H, S, d): + 2 D, and 4 bytes a head.
    - Stage 2, a block: 2 D (5 + 2 k), since a flow keeps no input, and of each flow 8 D bytes for its final
      state (int32) and 8 D for the context (float32): independent of ode_steps. ``reversible`` and ``verify``
      keep the initial state, too, 8 D, half of which is in ``reversible`` what the flow before it ended with;
      ``checkpoint`` 8 D a segment; ``backprop`` q (4 D) and what goes into
      and comes out of the hidden units (8 U) of every force, and the first p, but also float32 copies of the
      potential's weights, which are left out here.
    - Stage 0, a block, plain PyTorch: norms keep their input and its quotient, in float32 on a CPU:
      d (9 + 2 k) numbers, d (13 + 2 k) in bfloat16, and 4 h (SwiGLU) or 2 F.
    - A CPU keeps the scores, heads x seq_len numbers, of complex bfloat16 attention of at most 256 tokens,
      and their mask, seq_len^2 bytes a block.

    Dropout keeps its mask for both branches: a number each on a CPU, else a byte. What is computed again as a
    whole keeps the activated hidden channels of stage 1, too, 2 F.
    """
    width, size = width_of(stage, model), element_bytes(stage)
    d, heads = width.d_model, width.heads
    keys = 2 * width.kv_heads / heads
    dropped = d * (size if device == "cpu" else 1.0) * (stage.dropout > 0)
    if stage.number == "0":
        norm, end = (5, 5) if size == 2 and device == "cpu" else (3, 3)
        units = 4 * swiglu_units(width) if stage.activation == "swiglu" else 2 * width.d_ff
        return Activations(
            attention=size * d * (norm + 3 + keys) + 4 + 4 * heads + dropped,
            feed=size * (d * norm + units) + 4 + dropped,
            end=size * d * end + 4,
            table=4.0 * seq_len * d / heads,
        )
    attention = size * 2 * d * (4 + keys) + 4 + 2 * dropped
    table = 8.0 * seq_len * d / heads
    if _fused(stage, size, device):
        attention += size * 2 * d + 4 * heads
    elif seq_len <= HELD_KEYS:
        if stage.score != "real":
            raise ConfigError(
                f"stage.score={stage.score} has no memory model for windows of {seq_len} tokens on a CPU; "
                f"choose stage.score=real or more than {HELD_KEYS}"
            )
        attention += size * heads * seq_len
        table += seq_len**2
    feed = size * 2 * d + 4 + 2 * dropped
    if stage.number == "1":
        feed += size * 2 * (d + width.d_ff * (1 + computed_again(stage)))
    else:
        feed += _bytes_of_flows(stage, model)
    return Activations(attention=attention, feed=feed, end=size * 4 * d + 4, table=table)


def _fused(stage: StageConfig, size: int, device: str) -> bool:
    """Whether fused attention runs in stages 1 and 2, which keeps its output."""
    return device != "cpu" or (size == 4 and stage.score == "real")


def _bytes_of_flows(stage: StageConfig, model: ModelConfig) -> float:
    """Of a token, in a block."""
    shared = 4.0 * model.complex.d_model * (stage.gradient == "reversible")
    return stage.flows * _flow_bytes(stage, model) - (stage.flows - 1) * shared


def _flow_bytes(stage: StageConfig, model: ModelConfig) -> float:
    """Of a token and flow."""
    d = model.complex.d_model
    with_context = stage.potential == "mlp" and stage.context
    kept = 8.0 * d * with_context
    if stage.gradient == "backprop":
        return kept + 4 * d + forces(stage) * (4 * d + 8 * hidden_units(model.complex, stage))
    if stage.gradient == "checkpoint":
        return kept + 8 * d * segments(stage)
    compares = stage.gradient == "reversible" or stage.verify
    return kept + 8 * d * (1 + compares)


def memory(
    stage: StageConfig,
    model: ModelConfig,
    vocab_size: int,
    seq_len: int,
    windows: int,
    device: str = "cuda",
    parallel: str = "none",
    ranks: int = 1,
    accumulation: int = 1,
) -> Memory:
    """The peak of a training step with AdamW, the largest of its phases.

    b bytes a number, T = windows seq_len tokens, E = b V d or 2 b V D bytes of the embedding's gradient.

    What the forward pass keeps is what autograd keeps of all blocks. With ``recompute=block`` it is b bytes a
    number of the state of every ``recompute_blocks``-th block only, and with ``trunk=reversible`` 16 bytes a
    number of the state, z and v, for all blocks together. Behind the blocks nothing changes.

    1. The loss: activations, logits of min(T, 2^25 / V) tokens, their softmax of 2^22 numbers, the features'
       gradient, once more for a chunk, and E. What is pinned for kernels/linear_cross_entropy has no logits
       there, and its formula is larger by these.
    2. The backward pass of the last block, when all others still hold their activations: E, in stage 1 four
       times the hidden channels, in stage 0 three times those of up and gate, in stage 2 64 D bytes a token
       (states and gradients of a flow, in pieces and joined) and four times the hidden units of 1024 tokens.
       What autograd frees meanwhile is not counted. Eager attention on a CPU holds scores of some queries.
       With ``recompute=block`` there is what ``recompute_blocks`` blocks keep in addition, and the peak is at
       the last ones, when the inputs of all others are there, or at the first ones, when there is one input
       and all gradients but those of a block. With ``trunk=reversible`` it is in the first block: all
       gradients but its own, z and v, and of a sub-layer, attention or the other one, what it keeps, what its
       backward pass takes, its output and the gradient of that, b bytes a number each, and three float32
       gradients of the state, before and behind. That of attention takes the gradients of q, k and v; on a
       CPU in bfloat16 of its queries and scores.
    3. Its end: all gradients, E once more for the lookup, three states, and z and v.
    4. The update: all gradients; if they are bfloat16, on a CPU 26 bytes for each of 2^18 numbers: float32
       copies of parameter, gradient and moments, and random numbers. A GPU holds them in registers.

    ``ddp`` holds all gradients from the start, and so does a process that accumulates them. ``fsdp`` holds
    whole parameters of what is in no block and of two blocks, and while the gradients of a group are summed,
    these in b bytes and in float32; with accumulation all whole gradients, which are summed after the last
    micro-batch only.

    Args:
        vocab_size: entries of the vocabulary.
        seq_len: tokens in a window.
        windows: on this rank, in a micro-batch.
        device: ``cpu`` or ``cuda``: what attention keeps and takes.
        parallel: ``none``, ``ddp`` or ``fsdp``.
        ranks: how many share the model.
        accumulation: micro-batches of a step.
    """
    width, size = width_of(stage, model), element_bytes(stage)
    d = width.d_model * (1 if stage.number == "0" else 2)
    tokens = windows * seq_len
    found = shapes(stage, model, vocab_size)
    sharded = parallel == "fsdp"
    shards = ranks if sharded else 1
    # What FSDP gathers of a block and of what is left; without shards the parameters.
    block, rest = (sum(padded(shape, shards) for shape in group) for group in (found.blocks[0], found.rest))
    whole = width.layers * block + rest
    held = size * whole / shards
    kept = activation_bytes(stage, model, seq_len, device)
    layer = tokens * kept.layer + kept.table
    reversible, again = stage.trunk == "reversible", stage.recompute == "block"
    parts = -(-width.layers // stage.recompute_blocks) if again else 0
    states = tokens * d * (16 if reversible else size * parts)
    activations = states + (0 if reversible or again else width.layers) * layer + tokens * kept.end
    early = 0.0
    if parallel == "ddp" or accumulation > 1:
        early = size * whole
    gathered = summed_block = summed_rest = 0.0
    if sharded:
        gathered = size * (rest + min(2, width.layers) * block)
        summed_block, summed_rest = ((size + 4 + 4 / ranks) * group for group in (block, rest))
    embedding = size * vocab_size * d
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // vocab_size))
    softmax = min(max(1, SOFTMAX_ELEMENTS // vocab_size), chunk)
    loss = early + embedding + size * ((chunk + softmax) * vocab_size + (tokens + chunk) * d)
    late = max(early + embedding, held - size * block / shards)
    if reversible:
        backward = states + late + _sublayer_bytes(stage, model, kept, windows, seq_len, device)
    else:
        second_half = _block_bytes(stage, model, tokens)
        backward = max(second_half, _attention_bytes(stage, model, windows, seq_len, device))
        if again:
            backward += min(stage.recompute_blocks, width.layers) * layer
            backward += max(states + early + embedding, states / parts + late)
        else:
            backward += activations + early + embedding
    backward += summed_block - activations
    # Activations are gone from here on.
    end = max(held, early) + embedding + 3 * size * tokens * d + summed_rest - activations
    if reversible:
        end += states
    update = held - activations - gathered
    if size == 2 and device == "cpu":
        largest = max(padded(shape, shards) for shape in (*found.blocks[0], *found.rest)) // shards
        update += 26 * min(ADAMW_CHUNK, largest)
    return Memory(
        parameters=held,
        optimiser=2 * held,
        gradients=held,
        activations=activations,
        gathered=gathered,
        temporaries=max(loss, backward, end, update),
    )


def _block_bytes(stage: StageConfig, model: ModelConfig, tokens: int) -> float:
    """Temporaries of the backward pass of the last block's second half."""
    width, size = width_of(stage, model), element_bytes(stage)
    if stage.number == "0":
        return size * tokens * 6.0 * (swiglu_units(width) if stage.activation == "swiglu" else width.d_ff / 2)
    if stage.number == "1":
        # The activated ones, of which this is half, are kept where the whole block is computed again.
        return size * tokens * (2.0 if computed_again(stage) else 4.0) * width.d_ff
    units = hidden_units(width, stage) if stage.potential == "mlp" else width.d_model
    force = tokens * (size * 4 * width.d_model + 8.0 * units)
    if stage.gradient == "backprop":
        return force
    own = 64.0 * tokens * width.d_model + 16.0 * units * min(tokens, CHUNK)
    if stage.gradient == "checkpoint":
        kicks = stages(stage.integrator, stage.ode_steps, stage.dt).kicks
        own = force + tokens * -(-len(kicks) // segments(stage)) * (4 * width.d_model + 8.0 * units)
    return own


def _sublayer_bytes(
    stage: StageConfig, model: ModelConfig, kept: Activations, windows: int, seq_len: int, device: str
) -> float:
    """What the backward pass of a reversible trunk takes beside z and v: the larger of both sub-layers."""
    width, size = width_of(stage, model), element_bytes(stage)
    d = width.d_model * (1 if stage.number == "0" else 2)
    tokens = windows * seq_len
    feed = tokens * kept.feed + _block_bytes(stage, model, tokens)
    attention = tokens * kept.attention + kept.table
    if scores := _eager_scores(stage, model, windows, seq_len, device):
        attention += size * (EAGER_TENSORS * scores + 6 * tokens * d)
    elif stage.number != "0" and not _fused(stage, size, device):
        attention += size * tokens * (2 * width.heads * seq_len + d)
    else:
        attention += size * tokens * d * (1 + 2 * width.kv_heads / width.heads)
    return tokens * d * (12 + 2 * size) + max(feed, attention)


def _attention_bytes(
    stage: StageConfig, model: ModelConfig, windows: int, seq_len: int, device: str
) -> float:
    """What eager attention on a CPU takes in the last block, whose second half has let go what it kept."""
    width, size = width_of(stage, model), element_bytes(stage)
    scores = _eager_scores(stage, model, windows, seq_len, device)
    if not scores:
        return 0.0
    hidden = 2.0 * width.d_ff * (1 + (stage.recompute == "block"))
    let_go = size * hidden if stage.number == "1" else _bytes_of_flows(stage, model)
    return size * EAGER_TENSORS * scores + windows * seq_len * (size * 8 * width.d_model - let_go)


def _eager_scores(stage: StageConfig, model: ModelConfig, windows: int, seq_len: int, device: str) -> int:
    """Scores that eager attention on a CPU holds at a time, if it runs and does not hold them all."""
    if stage.number == "0" or _fused(stage, element_bytes(stage), device) or seq_len <= HELD_KEYS:
        return 0
    rows = windows * model.complex.heads
    step = min(max(EAGER_SCORES // (rows * seq_len), EAGER_QUERIES[0]), EAGER_QUERIES[1])
    # Queries of a block see the keys up to its end.
    ends = [min(first + step, seq_len) for first in range(0, seq_len, step)]
    return rows * max((end - first) * end for first, end in zip(range(0, seq_len, step), ends, strict=True))
