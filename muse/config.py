"""The configuration of every run: one dataclass per Hydra group, checked when it is built.

Hydra composes the YAML files of ``conf/`` against these dataclasses, so an unknown key or a
value of the wrong type fails before anything runs. Each option says with its default what it means and
which values it may have; ``__post_init__`` also checks what several options say together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse.errors import ConfigError
from muse.options import check_options, option

# Hydra's files, which travel with the package.
CONF = Path(__file__).with_name("conf")

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


@dataclass
class WidthConfig:
    """The sizes of one decoder."""

    d_model: int = option(96, "channels of the hidden state (complex channels in stage 1).", at_least=1)
    layers: int = option(4, "number of blocks.", at_least=1)
    heads: int = option(4, "attention heads.", at_least=1)
    kv_heads: int = option(4, "key and value heads (grouped-query attention); must divide heads.", at_least=1)
    d_ff: int = option(384, "hidden channels of the feed-forward block.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "model.*")
        for name, of in (("d_model", "heads"), ("heads", "kv_heads")):
            size, parts = getattr(self, name), getattr(self, of)
            if size % parts:
                raise ConfigError(f"model.*.{name}={size} is not divisible by model.*.{of}={parts}")


@dataclass
class ModelConfig:
    """A size, given as the widths of both stages so that their parameter counts agree."""

    name: str = option("tiny", "name of the size.", given_as="model")
    vocab_size: int = option(
        4096,
        "vocabulary that a trained tokenizer is given, and that benchmarks without text use.",
        at_least=2,
    )
    seq_len: int = option(128, "tokens in a training window.", at_least=1)
    lr: float = option(3e-3, "peak learning rate of AdamW that suits the size.", above=0)
    real: WidthConfig = option(WidthConfig(), "widths of stage 0.")
    complex: WidthConfig = option(WidthConfig(), "widths of stage 1.")

    def __post_init__(self) -> None:
        check_options(self, "model")


@dataclass
class SourceConfig:
    """One of the texts of data=mix."""

    weight: float = option(
        1.0, "its share of the training windows, beside the weights of the others.", above=0
    )
    data: str = option(
        "files",
        "what the option data says of one text.",
        choices=("files", "text", "wikitext2", "stdlib"),
    )
    path: str | None = option(None, "as data.path.")
    column: str | None = option(None, "as data.column.")
    valid: str | None = option(None, "as data.valid.")
    test: str | None = option(None, "as data.test.")
    skip_bad: bool = option(False, "as data.skip_bad.")

    def __post_init__(self) -> None:
        check_options(self, "data.sources.*")


@dataclass
class DataConfig:
    """Where the text comes from."""

    name: str = option(
        "stdlib",
        "stdlib (the standard library of the running Python), wikitext2, text (plain text), files (text and "
        "records in any format, larger than the memory; docs/data.md), mix (several of these by weight) or "
        "synthetic (random tokens, for the memory and speed benchmarks).",
        choices=("stdlib", "wikitext2", "text", "files", "mix", "synthetic"),
        given_as="data",
    )
    path: str | None = option(
        None,
        "a file or folder of plain text in UTF-8; needed by text, optional for wikitext2. Of a folder, "
        "files and folders named train, valid (validation, val, dev) and test are those splits, with any "
        "extension but a program's (train.txt, wiki.valid.tokens, train-00000-of-00002.txt, and "
        "stories-train.txt where there is stories-valid.txt); what is beside them is left out, and 5 % of "
        "the training text is held out for each one missing. Without such names all of it is split about "
        "90 / 5 / 5: files by a hash of their names, a single file at its end. For files a file, folder or "
        "pattern of text, jsonl, json, csv, parquet or arrow, packed (gz, zst, bz2, xz) or not, split by the "
        "same names or by a hash of each document.",
    )
    column: str | None = option(
        None,
        "of records, which holds the text; null for text or content, or else the only one with text (this "
        "and the next three are of files).",
    )
    valid: str | None = option(None, "file, folder or pattern of the validation split.")
    test: str | None = option(None, "file, folder or pattern of the test split.")
    skip_bad: bool = option(
        False, "whether rows and files that are broken are counted and left out in place of an error."
    )
    sources: dict[str, SourceConfig] = option(
        {},
        "texts of mix by name, each with weight (1 unless given) and what it would have alone: data (files "
        "unless given), path, column, valid, test and skip_bad.",
    )
    at_end: str = option(
        "repeat",
        "what a training does when it has seen a text, or a source of mix, once: repeat it in another order, "
        "or stop.",
        choices=("repeat", "stop"),
    )
    packing: str = option(
        "stream",
        "what a training window holds: stream (so many tokens in a row, whatever documents they are of) or "
        "documents (whole ones side by side, of which none sees another; docs/data.md).",
        choices=("stream", "documents"),
    )
    variant: str = option(
        "wikitext-2-v1",
        "the hub's configuration of WikiText-2, wikitext-2-v1 or wikitext-2-raw-v1.",
        choices=("wikitext-2-v1", "wikitext-2-raw-v1"),
    )
    cache: str = option(
        "outputs/cache", "folder of tokenizers and tokenised text; they are found again by content hash."
    )

    def __post_init__(self) -> None:
        check_options(self, "data")
        if self.name == "text" and not self.path:
            raise ConfigError("data=text needs data.path=<a file or a folder of text files>")
        if self.name == "files" and not self.path:
            raise ConfigError("data=files needs data.path=<a file, a folder or a pattern>")
        for name in ("column", "valid", "test", "skip_bad"):
            if getattr(self, name) and self.name != "files":
                raise ConfigError(f"data.{name} is of data=files; leave it out of data={self.name}")
        if self.name != "mix" and self.sources:
            raise ConfigError(f"data.sources is of data=mix; leave it out of data={self.name}")
        if self.name == "mix" and (self.path or not self.sources):
            raise ConfigError(
                "data=mix needs its texts, and no data.path, by data.sources={a:{path:<path>,weight:0.7},"
                "b:{path:<path>,weight:0.3}}"
            )
        for name in self.sources:
            self.source(name)

    def source(self, name: str) -> DataConfig:
        """A source of ``mix`` as data of its own.

        Raises:
            ConfigError: one of its options has a value that it must not have.
        """
        source, path = self.sources[name], f"data.sources.{name}"
        check_options(source, path)
        options = {
            option: getattr(source, option) for option in ("path", "column", "valid", "test", "skip_bad")
        }
        try:
            return replace(self, name=source.data, sources={}, **options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    name: str = option(
        "bpe",
        "bpe (byte-level, trained on the training split; text without white space is cut after every 256 "
        "characters), gpt2, word, file (a tokenizer.json of Hugging Face's, byte-level) or bytes (256 and an "
        "end of text).",
        choices=("bpe", "gpt2", "word", "file", "bytes"),
        given_as="tokenizer",
    )
    vocab_size: int = option(4096, "entries of a trained BPE, at least 257.")
    path: str | None = option(
        None,
        "local folder with vocab.json and merges.txt for gpt2, the hub if absent; tokenizer.json for file.",
    )

    def __post_init__(self) -> None:
        check_options(self, "tokenizer")
        # A byte-level BPE has every byte and the end of text.
        if self.name == "bpe" and self.vocab_size < 257:
            raise ConfigError(f"tokenizer.vocab_size={self.vocab_size} is too small; it must be at least 257")
        if self.name == "file" and not self.path:
            raise ConfigError("tokenizer=file needs tokenizer.path=<tokenizer.json>")


@dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    name: str = option(
        "adamw",
        "adamw, or muon for the weight matrices with AdamW for everything else.",
        choices=("adamw", "muon"),
        given_as="optim",
    )
    lr: float = option(3e-3, "peak learning rate of AdamW.", above=0)
    muon_lr: float = option(0.02, "peak learning rate of Muon.", above=0)
    weight_decay: float = option(
        0.1, "decoupled weight decay of weight matrices (norms and biases have none).", at_least=0
    )
    betas: list[float] = option(
        [0.9, 0.95], "decay of AdamW's first and second moment.", items=2, at_least=0, below=1
    )
    eps: float = option(1e-8, "AdamW's denominator offset.", above=0)
    momentum: float = option(0.95, "Muon's momentum.", at_least=0, below=1)
    second_moment: str = option(
        "plane",
        "plane lets AdamW scale the planes of a complex parameter apart; modulus uses |g|^2 for both, so "
        "that a step keeps the direction of the gradient.",
        choices=("plane", "modulus"),
    )
    schedule: str = option(
        "cosine",
        "cosine, wsd (warm-up, stable, linear decay) or constant.",
        choices=("cosine", "wsd", "constant"),
    )
    warmup: int = option(50, "steps of linear warm-up.", at_least=0)
    decay: float = option(0.2, "fraction of the steps in which wsd decays.", at_least=0, below=1)
    final_lr: float = option(
        0.1, "learning rate at the last step as a fraction of the peak.", at_least=0, at_most=1
    )
    clip: float = option(1.0, "largest gradient norm; 0 switches clipping off.", at_least=0)
    accumulation: int = option(1, "micro-batches that one update is the mean of.", at_least=1)
    selection: str = option(
        "none",
        "which tokens a step learns from: none (all), or of each micro-batch those with the highest loss "
        "(high), loss minus that of train.reference (reducible) or entropy of the model's distribution "
        "(entropy), or random ones (random).",
        choices=("none", "high", "reducible", "entropy", "random"),
    )
    selection_share: float = option(0.6, "share of the tokens that a selection keeps.", above=0, at_most=1)
    selection_warmup: int = option(
        0, "steps before a selection begins, which learn from all tokens.", at_least=0
    )
    selection_guard: float = option(
        0.25,
        "part of its even share, and at least one token, that a selection keeps of every window; 0 for none.",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "optim")

    @property
    def kept_share(self) -> float:
        """Share of the tokens that a step learns from, once a selection has begun."""
        return 1.0 if self.selection == "none" else self.selection_share


@dataclass
class HardwareConfig:
    """The device and how it is used."""

    device: str = option("auto", "auto (CUDA if there is one), cpu or cuda.", choices=("auto", "cpu", "cuda"))
    memory_gb: float | None = option(
        None, "cap of the CUDA allocator in GB (10^9 bytes); null for none.", above=0
    )
    threads: int | None = option(None, "CPU threads of PyTorch; null for PyTorch's own choice.", at_least=1)
    compile: bool = option(False, "whether the model is compiled with torch.compile.")
    kernels: str = option(
        "auto", "auto (Triton on a GPU) or eager (plain PyTorch everywhere).", choices=("auto", "eager")
    )
    parallel: str = option(
        "none",
        "what joins the processes that torchrun started: ddp (each holds the model) or fsdp (parameters, "
        "gradients and optimiser state are sharded); none for one process.",
        choices=("none", "ddp", "fsdp"),
    )

    def __post_init__(self) -> None:
        check_options(self, "hardware")


@dataclass
class LoggerConfig:
    """Where metrics go beside ``metrics.jsonl``, which is always written; ``logger=[csv,wandb]`` is both."""

    tensorboard: bool = option(
        False, "whether metrics, plots and options go to TensorBoard's files in the run folder, too."
    )
    csv: bool = option(False, "whether metrics.csv in the run folder has the lines of metrics as a table.")
    mode: str = option(
        "disabled", "W&B's offline, online or disabled.", choices=("offline", "online", "disabled")
    )
    project: str = option("muse", "W&B project.")
    entity: str | None = option(None, "W&B user or team; null for the account's own.")
    # W&B refuses a longer one, and so a longer tag, and then the whole run.
    group: str | None = option(
        None,
        "W&B group; null for that of the run that is continued, the folder of a sweep, or otherwise stage "
        "and model.",
        characters=128,
    )
    tags: list[str] = option([], "W&B tags beside stage, model and data.", characters=64)
    log_every: int = option(10, "optimiser steps between two lines of metrics.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "logger")


@dataclass
class TrainConfig:
    """How long to train and how often to look."""

    steps: int = option(800, "optimiser steps.", at_least=1)
    batch_size: int = option(16, "windows in a micro-batch.", at_least=1)
    eval_every: int = option(
        200,
        "steps between two evaluations on the validation split, the last step has one, too; 0 for none. "
        "The whole split is evaluated at the end in any case.",
        at_least=0,
    )
    eval_tokens: int = option(
        65536,
        "validation tokens of such an evaluation, in windows spread evenly over the split, the same ones "
        "each time; 0 for all.",
        at_least=0,
    )
    eval_stride: int | None = option(
        None, "tokens that the window moves by in an evaluation; null for no overlap.", at_least=1
    )
    early_stop: int = option(
        0,
        "evaluations in a row without a lower validation loss after which the training ends; 0 for none. The "
        "best checkpoint is kept in any case.",
        at_least=0,
    )
    init: str | None = option(
        None,
        "run folder, or exported file, whose weights the training begins with; stage, model and tokenizer "
        "are those that they were trained with.",
    )
    reference: str | None = option(
        None,
        "run folder, or exported file, of the trained model of optim.selection=reducible; of the same "
        "tokenizer, and of windows as long.",
    )
    test: bool = option(False, "whether the test split is evaluated at the end.")
    eval_sets: dict[str, str] = option(
        {}, "files of text or records, by names, which are evaluated at the end, too."
    )
    checkpoint_every: int = option(200, "steps between two checkpoints; 0 for the end only.", at_least=0)
    async_checkpoint: bool = option(
        False, "whether checkpoints are copied and then written while training goes on."
    )
    sample_tokens: int = option(64, "length of the text sample printed at the end.", at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "train")
        for name in {"train", "valid", "test"} & {*self.eval_sets}:
            raise ConfigError(f"train.eval_sets.{name} has the name of a split; choose another one")
        if self.early_stop and not self.eval_every:
            raise ConfigError(
                f"train.early_stop={self.early_stop} needs evaluations on the way; train.eval_every must be "
                "at least 1"
            )


# Each has a file of options.
BENCHMARKS = tuple(sorted(file.stem for file in (CONF / "benchmark").glob("*.yaml")))


@dataclass
class BenchmarkConfig:
    """What is measured and against what."""

    name: str = option(
        "all",
        "which benchmark; all runs every one that is about the stage, so not kernels and not adjoint, "
        "which compares with torchdiffeq, not price and ablation, which train for hours, and not deployment "
        "and serving, which start servers. Stage 3a has speedup, deployment and serving only.",
        choices=BENCHMARKS,
        given_as="benchmark",
    )
    batch_size: int | None = option(
        None,
        "windows in a measured batch; null for the benchmark's own (muse/benchmarks/workload.py).",
        at_least=1,
    )
    seq_len: int | None = option(
        None, "tokens in a measured window; null for the benchmark's own.", at_least=1
    )
    train_steps: int = option(
        20,
        "steps that both models are trained for when no checkpoint is given; 0 for none. speedup takes at "
        "least optim.accumulation.",
        at_least=0,
    )
    checkpoint: str | None = option(
        None,
        "run folder, or exported file, of the model under test; stage, model, data and tokenizer are "
        "those that it was trained with.",
    )
    baseline_checkpoint: str | None = option(
        None, "run folder, or exported file, of the baseline, trained on the same text."
    )
    wikitext2: str | None = option(
        None,
        "file of text, WikiText-2's test split, on which perplexity holds stages 2 and 3 against the one "
        "before, too; null for that of data=wikitext2, or for none.",
    )
    ptb: str | None = option(None, "likewise, of the Penn Treebank.")
    c4: str | None = option(None, "likewise, of C4.")
    warmup: int = option(2, "untimed steps.", at_least=0)
    repeats: int = option(7, "timed steps.", at_least=1)
    inputs: int = option(100, "random inputs of the stability benchmark.", at_least=1)
    rerun: bool = option(False, "whether a sweep measures again what a finished cell has already measured.")
    families: list[str] = option(
        ["attention", "linear", "pointwise", "symplectic", "scan", "loss", "adamw"],
        "of the kernels.",
        choices=("attention", "linear", "pointwise", "symplectic", "scan", "loss", "adamw"),
    )
    dtypes: list[str] = option(
        ["float32", "bfloat16"],
        "of the kernels: float32, bfloat16, float16.",
        choices=("float32", "bfloat16", "float16"),
    )
    width: int | None = option(
        None, "complex channels of the kernels' inputs; null for model.complex.d_model.", at_least=1
    )
    heads: int | None = option(None, "attention heads; null for model.complex.heads.", at_least=1)
    head_dim: int | None = option(
        None, "complex channels of a head; null for as many as in the model.", at_least=1
    )
    hidden: int | None = option(
        None,
        "output channels of the linear product and hidden channels of the symplectic flow; null for "
        "model.complex.d_ff.",
        at_least=1,
    )
    ode_steps: int | None = option(
        None,
        "steps of the flow, in place of the stage's; null for the benchmark's own. stability and "
        "gradients have the flow of the stage, and so has the perplexity of a checkpoint.",
        at_least=1,
    )
    dt: float | None = option(None, "size of a step of the flow, likewise.", above=0)
    integrator: str | None = option(None, "splitting scheme of the flow, likewise.", choices=INTEGRATORS)
    compile: bool = option(True, "whether torch.compile is one of the kernels' alternatives.")
    ablation: bool = option(
        False, "whether speedup trains with each part of the stack alone and left out, too."
    )

    seeds: int = option(
        3, "trainings of each model of price and ablation, with seeds from seed on.", at_least=1
    )
    variants: list[str] = option([], "of stage 3, by name, that ablation trains beside stage 2; [] for all.")
    stages: list[str] = option(
        ["0", "1", "2"],
        "that price trains beside the stage itself (this and what follows are of price).",
        choices=("0", "1", "2", "3"),
    )
    learning_rates: list[float] = option(
        [0.5, 1.0, 2.0],
        "multiples of the learning rate that each model is trained with at the first seed, and of which it "
        "keeps the best.",
        above=0,
    )
    loops: list[int] = option(
        [2, 4], "loops of the looped decoders of stage 0 beside it; [] for none.", at_least=2
    )
    flow_steps: list[int] = option(
        [2, 4], "multiples of the steps of the flow that stage 2 is trained with, too.", at_least=2
    )
    depths: list[float] = option(
        [2.0],
        "multiples of the number of blocks that stages 0 and 2 are trained with, too, to tell what loops and "
        "steps are worth.",
        above=0,
    )
    clients: list[int] = option(
        [1, 4, 8, 16, 32],
        "that ask at the same time, beside one alone (this and what follows are of serving).",
        at_least=1,
        at_most=256,
    )
    seconds: float = option(10.0, "of each load.", above=0, at_most=3600)
    minutes: float = option(1.0, "of the load that lasts.", above=0, at_most=60)

    def __post_init__(self) -> None:
        check_options(self, "benchmark")


@dataclass
class StackConfig:
    """The optimisation stack of stage 3a, whose parts can be switched off."""

    level: int = option(
        3,
        "of KernelOptimizer: 0 none, 1 fused operations and threads, 2 bf16 products, too, 3 compilation, "
        "too; what does not pay on this machine is left off.",
        choices=(0, 1, 2, 3),
    )
    compression: str = option(
        "auto",
        "of SemanticCompressor: auto (where the step would not fit memory_mb without it), on or off.",
        choices=("auto", "on", "off"),
    )
    ratio: float = option(
        0.3,
        "what compressed activations may take, as a fraction of their float32 size.",
        at_least=0.251,
        at_most=0.5,
        refusal="is not possible; activations in eight bits take {} of float32",
    )
    memory_mb: float = option(
        500.0, "peak memory of a training step that is allowed, in MB (10^6 bytes).", above=0
    )
    speculation: bool = option(True, "whether InferenceScalingEngine decodes the samples.")
    speculation_warmup: int = option(100, "passes in which it gathers statistics.", at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "stack")


@dataclass
class RunConfig:
    """Everything ``train.py`` needs."""

    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = option(0, "seed of initialisation, data order and dropout.", at_least=0)
    resume: str = option(
        "never",
        "never, auto (continue the newest run of the same options, or take its results) or the folder of "
        "a run, whose options are taken where none is given; how it goes on may change.",
    )
    output_root: str = option("outputs", "folder in which runs are written and looked for.")
    profile: bool = option(
        False, "whether the first steps are profiled (train.py only); see docs/profiling.md."
    )

    def __post_init__(self) -> None:
        check_options(self)
        stride = self.train.eval_stride
        if stride is not None and stride > self.model.seq_len:
            raise ConfigError(
                f"train.eval_stride={stride} skips tokens; it must be at most "
                f"model.seq_len={self.model.seq_len}"
            )
        if (self.optim.selection == "reducible") != (self.train.reference is not None):
            raise ConfigError(
                f"optim.selection={self.optim.selection} and train.reference="
                f"{self.train.reference or 'null'} do not go together; reducible needs train.reference=<run "
                "folder>, and nothing else has one"
            )
        if self.data.packing == "documents":
            self._check_packed()
        if self.hardware.parallel == "fsdp":
            self._check_sharded()

    def _check_packed(self) -> None:
        stage, selection = self.stage, self.optim.selection
        window, weight = stage.attention_window, stage.koopman_prediction
        for name, value, refused, instead in (
            ("stage", stage.number, stage.number == "3a", "0, 1, 2 or 3"),
            ("stage.mixer", stage.mixer, stage.mixer == "none", "attention"),
            ("stage.mera", stage.mera, stage.mera != "none", "none"),
            ("stage.attention_window", window, window is not None, "null"),
            ("stage.koopman_prediction", weight, weight > 0, "0"),
            ("optim.selection", selection, selection != "none", "none"),
        ):
            if refused:
                raise ConfigError(
                    f"data.packing=documents does not go with {name}={value}, which takes a window for one "
                    f"text; choose {name}={instead}, or data.packing=stream"
                )

    def _check_sharded(self) -> None:
        for name, value, refused, instead in (
            ("optim", self.optim.name, "muon", "optim=adamw"),
            ("stage.precision", self.stage.precision, "fp16-mixed", "bf16-mixed"),
            ("hardware.compile", self.hardware.compile, True, "hardware.compile=false"),
        ):
            if value == refused:
                raise ConfigError(
                    f"{name}={str(value).lower()} does not go with hardware.parallel=fsdp; choose "
                    f"{instead} or hardware.parallel=ddp"
                )


@dataclass
class BenchConfig(RunConfig):
    """Everything ``bench.py`` needs: a run and what to measure of it."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    stack: StackConfig = field(default_factory=StackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile:
            raise ConfigError(
                "profile=true is an option of train.py; bench.py has benchmark=throughput and vram"
            )
        if self.hardware.parallel != "none":
            raise ConfigError(
                f"hardware.parallel={self.hardware.parallel} is an option of train.py; bench.py measures in "
                "one process, without torchrun"
            )


@functools.cache
def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the names that conf/train.yaml and conf/bench.yaml use."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=RunConfig)
    store.store(name="bench_schema", node=BenchConfig)


def build_config(composed: DictConfig) -> Any:
    """Turn Hydra's composed configuration into checked dataclasses.

    Raises:
        ConfigError: when a value is not allowed, or refers to an option that does not exist.
    """
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be used: {str(error).splitlines()[0]}") from error
