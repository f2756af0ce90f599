"""The options of a stage: which language model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from muse.errors import ConfigError
from muse.options import check_options, option

GRADIENTS = ("exact", "reversible", "checkpoint", "backprop")


INTEGRATORS = (
    "leapfrog",
    "yoshida4",
    "blanes_moan4",
    "blanes_moan_rkn4",
    "yoshida6",
    "kahan_li6",
    "suzuki_umeno8",
    "position_verlet",
    "yoshida4_drift_first",
    "blanes_moan4_drift_first",
    "yoshida6_drift_first",
    "kahan_li6_drift_first",
    "suzuki_umeno8_drift_first",
)


# Activations of the feed-forward block, by the stage.
REAL_ACTIVATIONS = ("gelu", "swiglu")


COMPLEX_ACTIVATIONS = ("split_gelu", "mod_relu", "mod_swish", "cardioid", "z_relu")


ACTIVATIONS = {
    "0": REAL_ACTIVATIONS,
    "1": COMPLEX_ACTIVATIONS,
    "2": COMPLEX_ACTIVATIONS,
    "3": COMPLEX_ACTIVATIONS,
    "3a": ("gelu",),
}


# Options of the parts that stage 3 may have, and what all other stages have in their place.
STAGE_3_PARTS: dict[str, str | None] = {
    "koopman": "none",
    "mera": "none",
    "attention_window": None,
    "dialectic": "none",
}


# Stages whose blocks end in Hamiltonian flows.
FLOWING = ("2", "3")


@dataclass
class StageConfig:
    """Which language model is trained.

    Stage 0 is the real baseline, stage 1 the complex model, stage 2 the complex model whose feed-forward
    blocks are Hamiltonian flows, stage 3 that with Koopman operators and MERA routers beside attention,
    stage 3a a textbook's transformer.
    """

    number: str = option(
        "1",
        "name of the stage; 0 and 3a read model.real, 1, 2 and 3 read model.complex.",
        choices=("0", "1", "2", "3", "3a"),
        given_as="stage",
    )
    precision: str = option(
        "bf16",
        "fp32; bf16 (parameters, gradients, optimiser state and activations are all stored in bfloat16 "
        "and updates are rounded stochastically); bf16-mixed and fp16-mixed (float32 parameters under "
        "autocast, the latter with a loss scaler).",
        choices=("fp32", "bf16", "bf16-mixed", "fp16-mixed"),
    )
    mixer: str = option(
        "attention",
        "attention, or none for the block of the seeds, which mixes no tokens.",
        choices=("attention", "none"),
    )
    score: str = option(
        "real", "score kind of the complex attention.", choices=("real", "magnitude", "phase")
    )
    activation: str = option(
        "split_gelu",
        "activation of the feed-forward block; stages 2 and 3 have none.",
        choices=lambda stage: ACTIVATIONS[stage.number],
    )
    norm: str = option("rms", "normalisation layer.", choices=("rms", "layer"))
    init: str = option(
        "glorot", "scale of the Rayleigh initialisation of complex weights.", choices=("glorot", "he")
    )
    embedding_init: str = option("zeta", "initialisation of the token embedding.", choices=("zeta", "normal"))
    zeta_scale: float = option(1.0, "factor on the phases of the Zeta initialisation.", above=0)
    tied: bool = option(True, "whether the output head shares the token embedding.")
    dropout: float = option(
        0.0, "probability of dropping an activation on each residual branch.", at_least=0, below=1
    )
    trunk: str = option(
        "residual",
        "what carries the state through the blocks: residual sums, of which every block keeps what its "
        "gradient needs; or reversible, whole numbers that the backward pass subtracts again, so that what "
        "is kept does not grow with the depth, for one more forward pass. Not of stage 3a and mixer=none.",
        choices=("residual", "reversible"),
    )
    trunk_decay: float = option(
        0.5,
        "ratio of the state's share in the momentum of a reversible trunk to that of the sub-layer before; "
        "deep trunks take a slower one, which their whole numbers can hold.",
        above=0,
        at_most=1,
    )
    recompute: str = option(
        "none",
        "none, or block: only the input of a block is kept, and the backward pass computes the rest again.",
        choices=("none", "block"),
    )
    recompute_blocks: int = option(1, "blocks for each input that recompute=block keeps.", at_least=1)
    loops: int = option(
        1,
        "how often the state goes through all blocks, which share their weights: a looped decoder, whose "
        "embedding is added before each time but the first. Not of stage 3a.",
        at_least=1,
    )
    koopman: str = option(
        "none",
        "where a Koopman operator, a recurrence of the tokens with complex eigenvalues, stands in blocks of "
        "stage 3: replace (in place of attention), add (beside it) or none.",
        choices=("none", "replace", "add"),
    )
    koopman_every: int = option(
        2, "which blocks have a Koopman operator: every so many, from the first one on.", at_least=1
    )
    koopman_angles: bool = option(
        True, "whether its eigenvalues have angles, which are learned; without they are real."
    )
    koopman_selective: bool = option(
        True, "whether its decay depends on the token; without it is the same for all."
    )
    koopman_prediction: float = option(
        0.0,
        "weight of an auxiliary loss of each operator: how badly its state predicts the next token's "
        "observables, and how much these copy each other; 0 for none. Needs trunk=residual and "
        "recompute=none.",
        at_least=0,
    )
    mera: str = option(
        "none",
        "where a MERA router, which reads sums of the past at every scale, stands in blocks of stage 3: "
        "replace (in place of attention), add (beside it) or none. Where there is a Koopman operator, too, "
        "they are summed.",
        choices=("none", "replace", "add"),
    )
    mera_every: int = option(2, "which blocks have a MERA router: the last of every so many.", at_least=1)
    mera_levels: int = option(
        11,
        "of its tree above the tokens; nodes of the last one hold 2^mera_levels of them, and what is older "
        "than twice as many is not read.",
        at_least=1,
        at_most=30,
    )
    attention_window: int | None = option(
        None,
        "tokens that attention in stage 3 sees, a token itself and those before it; null for all. It runs in "
        "plain PyTorch.",
        at_least=1,
    )
    dialectic: str = option(
        "none",
        "what speaks in stage 3 against the likeliest tokens of the head: an energy of each, by an mlp of "
        "the state and the token, or by a hamiltonian of both; or none.",
        choices=("none", "mlp", "hamiltonian"),
    )
    dialectic_candidates: int = option(16, "likeliest tokens that have an energy.", at_least=1)
    dialectic_rounds: int = option(
        1, "rounds, each of which is told what the one before has come to.", at_least=1
    )
    ode_steps: int = option(1, "steps of the flow (this and what follows are of stages 2 and 3).", at_least=1)
    dt: float = option(1.0, "size of a step.", above=0)
    integrator: str = option(
        "leapfrog",
        "splitting scheme of a step; the number in its name is its order, that of leapfrog and of "
        "position_verlet is 2. The latter and those in drift_first need a force less.",
        choices=INTEGRATORS,
    )
    gradient: str = option(
        "exact",
        "exact (fixed-point state, rebuilt bit by bit), reversible (floating point), checkpoint or backprop.",
        choices=GRADIENTS,
    )
    potential: str = option(
        "mlp", "mlp, or duffing (a spring a channel that hardens).", choices=("mlp", "duffing")
    )
    potential_width: int | None = option(
        None, "hidden units of the MLP; null for as many parameters as in stage 1.", at_least=1
    )
    phi: str = option(
        "gelu_integral",
        "what the MLP sums; the activation of the force is its derivative.",
        choices=("gelu_integral", "silu", "gelu", "softplus"),
    )
    flows: int = option(
        2,
        "flows in a block, each with a potential of its own, on the state of the one before times i.",
        at_least=1,
    )
    context: bool = option(
        True, "whether the MLP sees where a token starts its flow, too, through weights of its own."
    )
    confinement: float = option(
        0.5,
        "stiffness of a spring beside the MLP, which keeps tokens from leaving along directions in which "
        "it is flat; 0 for none.",
        at_least=0,
    )
    force_precision: str = option(
        "fp32",
        "precision of the force's matrix products. In half precision they are no gradient of a potential "
        "to the last digits, and the energy drifts by 1e-3 instead of 1e-6.",
        choices=("fp32", "bf16", "fp16"),
    )
    fraction_bits: int = option(
        23,
        "of the fixed-point state of exact, whose range is 2^(31 - fraction_bits).",
        at_least=8,
        at_most=28,
    )
    recon_threshold: float = option(
        1e-5, "reconstruction error from which on reversible falls back to checkpointing.", above=0
    )
    verify: bool = option(
        False, "whether exact compares what it rebuilds with its input, which is then kept."
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        if self.trunk == "reversible":
            if self.number == "3a" or self.mixer == "none":
                raise ConfigError(
                    "stage.trunk=reversible needs blocks that add to their state: stage 0, 1, 2 or 3 with "
                    "stage.mixer=attention"
                )
            if self.recompute != "none":
                raise ConfigError(
                    f"stage.recompute={self.recompute} has nothing to do with stage.trunk=reversible, which "
                    "computes every sub-layer again; it must be none"
                )
        if self.loops > 1 and (self.number == "3a" or self.trunk == "reversible"):
            raise ConfigError(
                f"stage.loops={self.loops} needs stage 0, 1, 2 or 3 with stage.trunk=residual; it must be 1"
            )
        if self.flowing and self.mixer == "none":
            raise ConfigError("stage.mixer=none is the block of the seeds; it goes with stage=1")
        again = self.trunk == "reversible" or self.recompute != "none"
        if self.koopman_prediction and self.koopman != "none" and again:
            raise ConfigError(
                f"stage.koopman_prediction={self.koopman_prediction} is a loss of what blocks compute on the "
                "way, which cannot be computed again; it needs stage.trunk=residual and stage.recompute=none"
            )
        for part, without in STAGE_3_PARTS.items():
            if self.number != "3" and (value := getattr(self, part)) != without:
                raise ConfigError(f"stage.{part}={value} is of stage=3; it must be {without or 'null'}")

    @property
    def flowing(self) -> bool:
        """Whether blocks end in Hamiltonian flows."""
        return self.number in FLOWING
