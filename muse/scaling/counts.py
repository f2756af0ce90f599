"""Parameters and FLOPs of stages 0, 1, 2 and 3, by their formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from muse.config import ModelConfig, StageConfig, WidthConfig
from muse.dynamics.integrators import stages
from muse.errors import ConfigError
from muse.layers.koopman import TAPS
from muse.layers.mera import BLOCK, READ, read_shape
from muse.models.dialectic import UNITS
from muse.models.hamiltonian import hidden_units
from muse.models.integrated import has_attention, has_koopman, has_mera

Shape = tuple[int, ...]
# Real products that make one of the scores, and one of the weights, of complex attention.
PARTS = {"real": (1, 1), "magnitude": (2, 1), "phase": (2, 2)}
# What a learned gate of a hidden channel has.
GATES = {"mod_relu": 1, "mod_swish": 2}


@dataclass(frozen=True)
class Shapes:
    """Shapes of the parameters, as ``hardware.parallel=fsdp`` groups them.

    Attributes:
        blocks: of each block.
        rest: embedding, last norm, a head that is not shared with the embedding, and an antithesis.
    """

    blocks: list[list[Shape]]
    rest: list[Shape]

    @property
    def numbers(self) -> int:
        """Real numbers in all of them."""
        return sum(map(numbers, self.blocks)) + numbers(self.rest)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a token: multiplications and additions of matrix products, no others.

    Attributes:
        maps: of the linear maps of all blocks, and of what MERA routers read.
        attention: of queries with keys and of weights with values.
        forces: of the flows of stage 2, in ``stage.force_precision``; all others are in ``stage.precision``.
        head: of the logits, and of an antithesis.
    """

    maps: float
    attention: float
    forces: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.maps + self.attention + self.forces + self.head


def check_modelled(stage: StageConfig) -> None:
    """Refuse what the formulas leave out.

    Raises:
        ConfigError: stage 3a, and attention in windows.
    """
    if stage.attention_window is not None:
        raise ConfigError(
            f"stage.attention_window={stage.attention_window} has no cost model; choose "
            "stage.attention_window=null"
        )
    if stage.number == "3a":
        raise ConfigError("stage=3a has no cost model; choose stage=0, 1, 2 or 3")


def width_of(stage: StageConfig, model: ModelConfig) -> WidthConfig:
    """The widths that a stage reads."""
    return model.real if stage.number == "0" else model.complex


def swiglu_units(width: WidthConfig) -> int:
    """Hidden channels h of stage 0's SwiGLU: 8 ceil(d_ff / 12), two thirds of d_ff."""
    return 8 * math.ceil(width.d_ff / 12)


def shapes(stage: StageConfig, model: ModelConfig, vocab_size: int) -> Shapes:
    """The parameters.

    With C = (heads + 2 kv_heads) d_model / heads channels of queries, keys and values, a block has

    - stage 0: d C + d^2 + 2 d, and 2 d F (GELU) or 3 d h (SwiGLU);
    - stage 1: 2 D C + 2 D^2 + 4 D F, two norms of 2 D (rms) or 5 D (layer), gates of 0, F or 2 F;
    - stage 1 with mixer=none: 2 D^2 + 2 D + D + 4 D;
    - stage 2: as stage 1, but for 4 D F and the gates ``flows`` times U D + 2 U, and 2 U D with a context;
    - stage 3: as stage 2, but for 2 D C + 2 D^2 of an attention 8 D^2 + 7 D of a Koopman operator, or of a
      MERA router of L levels 6 D^2 + 5 L D, and 2 heads (L + 1) (2 D + 1).

    What is left is an embedding of V d or 2 V D, once more as much if ``tied`` is false, and a norm; in
    stage 3 with an antithesis of u units 4 u D + u^2 + 2 u.
    """
    check_modelled(stage)
    width = width_of(stage, model)
    d, hidden = width.d_model, width.d_ff
    channels = (width.heads + 2 * width.kv_heads) * d // width.heads
    if stage.number == "0":
        units = swiglu_units(width) if stage.activation == "swiglu" else hidden
        up = 2 * units if stage.activation == "swiglu" else units
        head: list[Shape] = [] if stage.tied else [(vocab_size, d)]
        block: list[Shape] = [(d,), (channels, d), (d, d), (d,), (up, d), (d, units)]
        return Shapes(width.layers * [block], [(vocab_size, d), (d,), *head])
    if stage.mixer == "none":
        block = [(2, d), (2, d, d), (2, d), (d,), (2, d)]
        rest: list[Shape] = [(vocab_size, 2, d), (model.seq_len, d), (2, d), (vocab_size, d), (vocab_size,)]
        return Shapes(width.layers * [block], rest)
    norm: list[Shape] = [(2, d)] if stage.norm == "rms" else [(3, d), (2, d)]
    attention: list[Shape] = [(2, channels, d), (2, d, d)]
    if stage.number == "1":
        feed: list[Shape] = [(2, hidden, d), *[(hidden,)] * GATES.get(stage.activation, 0), (2, d, hidden)]
    else:
        feed = potential_shapes(stage, model)
    blocks = [
        [
            *(attention if has_attention(stage, block) else []),
            *(koopman_shapes(stage, d) if has_koopman(stage, block) else []),
            *(mera_shapes(stage, width) if has_mera(stage, block) else []),
            *(*norm, *norm, *feed),
        ]
        for block in range(width.layers)
    ]
    head = [] if stage.tied else [(vocab_size, 2 * d)]
    return Shapes(blocks, [(vocab_size, 2, d), *norm, *head, *antithesis_shapes(stage, d)])


def antithesis_shapes(stage: StageConfig, d: int) -> list[Shape]:
    """The parameters of the antithesis of a model of d channels; none without one."""
    if stage.dialectic == "none":
        return []
    return [(UNITS, 2 * d), (UNITS, 2 * d), (UNITS, UNITS), (UNITS,), (UNITS,)]


def antithesis_flops(stage: StageConfig, d: int, vocab_size: int) -> float:
    """FLOPs of a token in a forward pass: maps of the state, each candidate and each round's mean."""
    if stage.dialectic == "none":
        return 0.0
    candidates = min(stage.dialectic_candidates, vocab_size)
    return 2.0 * UNITS * (2 * d * (1 + candidates) + UNITS * stage.dialectic_rounds)


def koopman_shapes(stage: StageConfig, d: int) -> list[Shape]:
    """The parameters of a Koopman operator of d observables on d channels."""
    angles: list[Shape] = [(d,)] if stage.koopman_angles else []
    rate: list[Shape] = [_rate_shape(d), (d,)] if stage.koopman_selective else []
    return [(2, 2 * d, d), (2, d, d), (d, TAPS), (d,), *angles, *rate]


def _rate_shape(d: int) -> Shape:
    return (d, 2 * d)


def mera_shapes(stage: StageConfig, width: WidthConfig) -> list[Shape]:
    """The parameters of a MERA router."""
    d, levels, router = width.d_model, stage.mera_levels, _router_shape(stage, width)
    return [(2, 2 * d, d), (levels, 2 * d), (levels, 3 * d), router, router[:1], (2, d, d)]


def _router_shape(stage: StageConfig, width: WidthConfig) -> Shape:
    return (width.heads * READ * (stage.mera_levels + 1), 2 * width.d_model)


def _read_flops(stage: StageConfig, d: int, seq_len: int) -> float:
    """Of the product by which a token of a MERA router reads."""
    blocks, nodes = read_shape(seq_len, stage.mera_levels)
    return 4.0 * d * blocks * BLOCK * nodes / seq_len


def potential_shapes(stage: StageConfig, model: ModelConfig) -> list[Shape]:
    """The parameters of the flows of a block of stages 2 and 3; none in other stages."""
    if not stage.flowing:
        return []
    d = model.complex.d_model
    if stage.potential == "duffing":
        return [(d,) for _ in range(2 * stage.flows)]
    units = hidden_units(model.complex, stage)
    context: list[Shape] = [(units, 2 * d)] if stage.context else []
    return stage.flows * [(units, d), (units,), (units,), *context]


def numbers(of: Iterable[Shape]) -> int:
    """Real numbers in tensors of these shapes."""
    return sum(math.prod(shape) for shape in of)


def parameters(stage: StageConfig, model: ModelConfig, vocab_size: int) -> int:
    """What ``muse.models.count_parameters`` counts."""
    return shapes(stage, model, vocab_size).numbers


def forces(stage: StageConfig) -> int:
    """Forces of one flow: 6 ode_steps + 1 by the default integrator, ode_steps + 1 by leapfrog."""
    return stages(stage.integrator, stage.ode_steps, stage.dt).forces


def segment_length(stage: StageConfig) -> int:
    """Stages of the integrator that ``gradient=checkpoint`` computes again together."""
    return math.isqrt(len(stages(stage.integrator, stage.ode_steps, stage.dt).kicks) - 1) + 1


def segments(stage: StageConfig) -> int:
    """Parts that ``gradient=checkpoint`` computes again."""
    return math.ceil(len(stages(stage.integrator, stage.ode_steps, stage.dt).kicks) / segment_length(stage))


def forward_flops(stage: StageConfig, model: ModelConfig, vocab_size: int, seq_len: int) -> Flops:
    """FLOPs of a token in a forward pass over windows of ``seq_len``.

    A real map takes 2 in out, a complex one 8 in out. Attention takes 2 products of width d (2 D where
    complex; 3 for magnitude, 4 for phase scores) over the causal half of the keys, 2 d seq_len / 2 each:
    fused kernels skip the other half but for the blocks on the diagonal. On a CPU complex bfloat16 attention
    of windows up to 256 tokens takes all keys.

    A force of stage 2 is two products with the U x D matrix W1, 4 U D; the context, 2 D wide, takes one of
    4 U D once a flow (once a segment with ``gradient=checkpoint``): 4 U D (forces + 1).

    A Koopman operator has complex maps and a real one, of 4 D^2; its scan is no product. Of a MERA router
    there is the map from a state to its weights, 8 D heads (L + 1), and with the maps the product that reads
    the N nodes of ``read_shape``, 4 D N and a little more; its tree is no product.
    """
    width = width_of(stage, model)
    d = width.d_model
    planes = 1 if stage.number == "0" else 2
    found = shapes(stage, model, vocab_size)
    # A complex map is a (2, out, in) weight: 8 in out = 4 a number. Potentials have no such shape.
    axes = 2 if planes == 1 else 3
    linear = numbers(shape for block in found.blocks for shape in block if len(shape) == axes)
    rates = stage.koopman_selective * sum(has_koopman(stage, block) for block in range(width.layers))
    routers = sum(has_mera(stage, block) for block in range(width.layers))
    attentions = sum(has_attention(stage, block) for block in range(width.layers))
    products = sum(PARTS[stage.score]) if planes == 2 else 2
    of_forces = 0.0
    if stage.flowing and stage.potential == "mlp":
        once = segments(stage) if stage.gradient == "checkpoint" else 1
        count = forces(stage) + once * stage.context
        of_forces = 4.0 * hidden_units(width, stage) * d * count * stage.flows
    passes = width.layers * stage.loops
    maps = 2.0 * planes * linear + 2.0 * numbers([_rate_shape(d)]) * rates
    if routers:
        router = 2.0 * numbers([_router_shape(stage, width)]) + _read_flops(stage, d, seq_len)
        maps += router * routers
    return Flops(
        maps=maps * stage.loops,
        attention=float(attentions) * products * 2 * planes * d * (seq_len // 2) * stage.loops,
        forces=of_forces * passes,
        head=2.0 * vocab_size * d * (planes if stage.mixer == "attention" else 1)
        + antithesis_flops(stage, d, vocab_size),
    )


def computed_again(stage: StageConfig) -> bool:
    """Whether the backward pass computes all blocks again."""
    return stage.trunk == "reversible" or stage.recompute == "block"


def skips_first_kick(stage: StageConfig) -> bool:
    """Whether the backward pass of a flow leaves the initial state alone, which nobody asks for."""
    return stage.gradient == "exact" and not stage.verify


def step_flops(
    stage: StageConfig, model: ModelConfig, vocab_size: int, seq_len: int, kept: float = 1.0
) -> Flops:
    """FLOPs of a token in a training step, as the code executes them.

    Maps and head: three times the forward pass; what is computed again is the activation, no product.
    Attention: two and five products, since the backward pass computes the scores again (3 and 8 for
    magnitude, 4 and 10 for phase).

    Forces, in units of 4 U D and n = forces of a flow, +1 for the context:

    - ``backprop``: 1 forward, 2 backward: 3 (n + 1);
    - ``exact`` and ``reversible``: the backward pass computes each force again (2 products), its
      Hessian-vector product (2) and the gradients of both factors W1 (2); the context's product again, and
      two for its gradients: 1 forward, 3 backward: 4 (n + 1), but that ``exact``, where it does not verify,
      undoes no first kick, which saves one product: 4 (n + 1) - 1 / 2;
    - ``checkpoint``: as backprop, and segments once more but for the last product of each:
      4 (n + g) - g / 2 with g segments.

    ``trunk=reversible`` takes one more forward pass of all blocks, with every gradient of the flow as much as
    it takes without, and so does ``recompute=block``, but for what ``_left_out`` says.

    Where a step learns from a share ``kept`` < 1 of the tokens, all else is computed for every token, and the
    head takes 1 + 3 ``kept`` forward passes, the first one for the scores. The forward pass of a reference,
    whose size is another model's, is left out.
    """
    forward = forward_flops(stage, model, vocab_size, seq_len)
    of_scores, of_weights = PARTS[stage.score] if stage.number != "0" else (1, 1)
    both = of_scores + of_weights
    flow = forward.forces
    if stage.gradient == "backprop":
        flow *= 3
    elif stage.gradient == "checkpoint":
        parts = segments(stage)
        units = forces(stage) + parts * stage.context
        flow *= 4 - parts / 2 / units
    else:
        flow *= 4 - skips_first_kick(stage) / 2 / (forces(stage) + stage.context)
    again = computed_again(stage)
    maps_left_out, forces_left_out = _left_out(stage, model) if stage.recompute == "block" else (0.0, 0.0)
    return Flops(
        maps=(3 + again) * forward.maps - maps_left_out,
        attention=forward.attention * (both + 2 * both + of_scores + again * both) / both,
        forces=flow + again * forward.forces - forces_left_out,
        head=(3 if kept == 1 else 1 + 3 * kept) * forward.head,
    )


def _left_out(stage: StageConfig, model: ModelConfig) -> tuple[float, float]:
    """FLOPs of a token, in maps and in forces, that ``recompute=block`` does not take a second time.

    Each part of ``recompute_blocks`` blocks stops where all that its backward pass asks for is there: in
    stage 0 before the last map, 2 d h or 2 d F; in stage 2 with ``gradient=backprop`` before the last product
    of the last flow, 2 U D, with ``checkpoint`` before its last segment. A dropout behind them needs all.
    """
    width = width_of(stage, model)
    parts = math.ceil(width.layers / stage.recompute_blocks) * stage.loops
    if stage.dropout > 0:
        return 0.0, 0.0
    if stage.number == "0":
        units = swiglu_units(width) if stage.activation == "swiglu" else width.d_ff
        return 2.0 * width.d_model * units * parts, 0.0
    if stage.number == "1" or stage.potential != "mlp":
        return 0.0, 0.0
    product = 2.0 * hidden_units(width, stage) * width.d_model * parts
    if stage.gradient == "backprop":
        return 0.0, product
    if stage.gradient == "checkpoint":
        kicks = stages(stage.integrator, stage.ode_steps, stage.dt).kicks
        last = kicks[(segments(stage) - 1) * segment_length(stage) :]
        return 0.0, 2 * product * (sum(kick != 0 for kick in last) + stage.context)
    return 0.0, 0.0
