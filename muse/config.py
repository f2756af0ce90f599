"""The configuration of every run: one dataclass per Hydra group, checked when it is built.

Hydra composes the YAML files of ``conf/`` against these dataclasses, so an unknown key or a
value of the wrong type fails before anything runs. ``__post_init__`` checks what types cannot
say; each message names the option and the values allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse.errors import ConfigError, ValueUnknown

# Hydra's files, which travel with the package.
CONF = Path(__file__).with_name("conf")


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueUnknown(f"{option}={value} is not known; choose one of {', '.join(allowed)}", allowed)


def _finite(option: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{option}={value} is not allowed; it must be a finite number")


def _at_least(option: str, value: float, minimum: float) -> None:
    _finite(option, value)
    if not value >= minimum:
        raise ConfigError(f"{option}={value} is too small; it must be at least {minimum:g}")


def _positive(option: str, value: float) -> None:
    _finite(option, value)
    if not value > 0:
        raise ConfigError(f"{option}={value} is not allowed; it must be greater than 0")


def _fraction(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{option}={value} is not allowed; it must be at least 0 and below 1")


STAGES = ("0", "1", "2", "3a")
PRECISIONS = ("fp32", "bf16", "bf16-mixed", "fp16-mixed")
MIXERS = ("attention", "none")
SCORES = ("real", "magnitude", "phase")
ACTIVATIONS = ("split_gelu", "mod_relu", "mod_swish", "cardioid", "z_relu")
REAL_ACTIVATIONS = ("gelu", "swiglu")
NORMS = ("rms", "layer")
INITS = ("glorot", "he")
EMBEDDING_INITS = ("zeta", "normal")
GRADIENTS = ("exact", "reversible", "checkpoint", "backprop")
INTEGRATORS = (
    "leapfrog",
    "yoshida4",
    "blanes_moan4",
    "blanes_moan_rkn4",
    "yoshida6",
    "kahan_li6",
    "suzuki_umeno8",
)
POTENTIALS = ("mlp", "duffing")
PHIS = ("gelu_integral", "silu", "gelu", "softplus")
FORCE_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class StageConfig:
    """Which language model is trained.

    Stage 0 is the real baseline, stage 1 the complex model, stage 2 the complex model whose feed-forward
    blocks are Hamiltonian flows, stage 3a a textbook's transformer.

    Attributes:
        number: name of the stage; 0 and 3a read ``model.real``, 1 and 2 read ``model.complex``.
        precision: ``fp32``; ``bf16`` (parameters, gradients, optimiser state and activations are all
            stored in bfloat16 and updates are rounded stochastically); ``bf16-mixed`` and
            ``fp16-mixed`` (float32 parameters under autocast, the latter with a loss scaler).
        mixer: ``attention``, or ``none`` for the block of the seeds, which mixes no tokens.
        score: score kind of the complex attention.
        activation: activation of the feed-forward block; stage 2 has none.
        norm: normalisation layer.
        init: scale of the Rayleigh initialisation of complex weights.
        embedding_init: initialisation of the token embedding.
        zeta_scale: factor on the phases of the Zeta initialisation.
        tied: whether the output head shares the token embedding.
        dropout: probability of dropping an activation on each residual branch.
        ode_steps: steps of the flow (this and what follows are of stage 2).
        dt: size of a step.
        integrator: splitting scheme of a step; the number in its name is its order, leapfrog's is 2.
        gradient: ``exact`` (fixed-point state, rebuilt bit by bit), ``reversible`` (floating point),
            ``checkpoint`` or ``backprop``.
        potential: ``mlp``, or ``duffing`` (a spring a channel that hardens).
        potential_width: hidden units of the MLP; null for as many parameters as in stage 1.
        phi: what the MLP sums; the activation of the force is its derivative.
        flows: flows in a block, each with a potential of its own, on the state of the one before times i.
        context: whether the MLP sees where a token starts its flow, too, through weights of its own.
        confinement: stiffness of a spring beside the MLP, which keeps tokens from leaving along directions
            in which it is flat; 0 for none.
        force_precision: precision of the force's matrix products. In half precision they are no gradient of
            a potential to the last digits, and the energy drifts by 1e-3 instead of 1e-6.
        fraction_bits: of the fixed-point state of ``exact``, whose range is 2^(31 - fraction_bits).
        recon_threshold: reconstruction error from which on ``reversible`` falls back to checkpointing.
        verify: whether ``exact`` compares what it rebuilds with its input, which is then kept.
    """

    number: str = "1"
    precision: str = "bf16"
    mixer: str = "attention"
    score: str = "real"
    activation: str = "split_gelu"
    norm: str = "rms"
    init: str = "glorot"
    embedding_init: str = "zeta"
    zeta_scale: float = 1.0
    tied: bool = True
    dropout: float = 0.0
    ode_steps: int = 1
    dt: float = 1.0
    integrator: str = "blanes_moan_rkn4"
    gradient: str = "exact"
    potential: str = "mlp"
    potential_width: int | None = None
    phi: str = "gelu_integral"
    flows: int = 2
    context: bool = True
    confinement: float = 0.5
    force_precision: str = "fp32"
    fraction_bits: int = 23
    recon_threshold: float = 1e-5
    verify: bool = False

    def __post_init__(self) -> None:
        _one_of("stage", self.number, STAGES)
        _one_of("stage.precision", self.precision, PRECISIONS)
        _one_of("stage.mixer", self.mixer, MIXERS)
        _one_of("stage.score", self.score, SCORES)
        if self.number == "0":
            _one_of("stage.activation", self.activation, REAL_ACTIVATIONS)
        elif self.number == "3a":
            _one_of("stage.activation", self.activation, ("gelu",))
        else:
            _one_of("stage.activation", self.activation, ACTIVATIONS)
        _one_of("stage.norm", self.norm, NORMS)
        _one_of("stage.init", self.init, INITS)
        _one_of("stage.embedding_init", self.embedding_init, EMBEDDING_INITS)
        _positive("stage.zeta_scale", self.zeta_scale)
        _fraction("stage.dropout", self.dropout)
        if self.number == "2" and self.mixer == "none":
            raise ConfigError("stage.mixer=none is the block of the seeds; it goes with stage=1")
        _at_least("stage.ode_steps", self.ode_steps, 1)
        _positive("stage.dt", self.dt)
        _one_of("stage.integrator", self.integrator, INTEGRATORS)
        _one_of("stage.gradient", self.gradient, GRADIENTS)
        _one_of("stage.potential", self.potential, POTENTIALS)
        if self.potential_width is not None:
            _at_least("stage.potential_width", self.potential_width, 1)
        _at_least("stage.flows", self.flows, 1)
        _at_least("stage.confinement", self.confinement, 0)
        _one_of("stage.phi", self.phi, PHIS)
        _one_of("stage.force_precision", self.force_precision, FORCE_PRECISIONS)
        if not 8 <= self.fraction_bits <= 28:
            raise ConfigError(f"stage.fraction_bits={self.fraction_bits} is not allowed; choose 8 to 28")
        _positive("stage.recon_threshold", self.recon_threshold)


@dataclass
class WidthConfig:
    """The sizes of one decoder.

    Attributes:
        d_model: channels of the hidden state (complex channels in stage 1).
        layers: number of blocks.
        heads: attention heads.
        kv_heads: key and value heads (grouped-query attention); must divide ``heads``.
        d_ff: hidden channels of the feed-forward block.
    """

    d_model: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    d_ff: int = 384

    def __post_init__(self) -> None:
        for name in ("d_model", "layers", "heads", "kv_heads", "d_ff"):
            _at_least(f"model.*.{name}", getattr(self, name), 1)
        if self.d_model % self.heads:
            raise ConfigError(
                f"model.*.d_model={self.d_model} is not divisible by model.*.heads={self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.*.heads={self.heads} is not divisible by model.*.kv_heads={self.kv_heads}"
            )


@dataclass
class ModelConfig:
    """A size, given as the widths of both stages so that their parameter counts agree.

    Attributes:
        name: name of the size.
        vocab_size: vocabulary that a trained tokenizer is given, and that benchmarks without text use.
        seq_len: tokens in a training window.
        lr: peak learning rate of AdamW that suits the size.
        real: widths of stage 0.
        complex: widths of stage 1.
    """

    name: str = "tiny"
    vocab_size: int = 4096
    seq_len: int = 128
    lr: float = 3e-3
    real: WidthConfig = field(default_factory=WidthConfig)
    complex: WidthConfig = field(default_factory=WidthConfig)

    def __post_init__(self) -> None:
        _at_least("model.vocab_size", self.vocab_size, 2)
        _at_least("model.seq_len", self.seq_len, 1)
        _positive("model.lr", self.lr)


CORPORA = ("stdlib", "wikitext2", "text", "synthetic")


@dataclass
class DataConfig:
    """Where the text comes from.

    Attributes:
        name: ``stdlib`` (the standard library of the running Python), ``wikitext2``, ``text``
            (any files) or ``synthetic`` (random tokens, for the memory and speed benchmarks).
        path: a file or folder of plain text in UTF-8; needed by ``text``, optional for ``wikitext2``. Of a
            folder, files and folders named train, valid (validation, val, dev) and test are those splits,
            with any extension but a program's (train.txt, wiki.valid.tokens, train-00000-of-00002.txt, and
            stories-train.txt where there is stories-valid.txt); what is beside them is left out, and 5 % of
            the training text is held out for each one missing. Without such names all of it is split
            about 90 / 5 / 5: files by a hash of their names, a single file at its end.
        variant: the hub's configuration of WikiText-2, ``wikitext-2-v1`` or ``wikitext-2-raw-v1``.
        cache: folder of tokenizers and tokenised text; they are found again by content hash.
    """

    name: str = "stdlib"
    path: str | None = None
    variant: str = "wikitext-2-v1"
    cache: str = "outputs/cache"

    def __post_init__(self) -> None:
        _one_of("data", self.name, CORPORA)
        _one_of("data.variant", self.variant, ("wikitext-2-v1", "wikitext-2-raw-v1"))
        if self.name == "text" and not self.path:
            raise ConfigError("data=text needs data.path=<a file or a folder of text files>")


@dataclass
class TokenizerConfig:
    """How text becomes tokens.

    Attributes:
        name: ``bpe`` (byte-level, trained on the training split; text without white space is cut after every
            256 characters), ``gpt2`` or ``word``.
        vocab_size: entries of a trained BPE.
        path: local folder with ``vocab.json`` and ``merges.txt`` for ``gpt2``; the hub if absent.
    """

    name: str = "bpe"
    vocab_size: int = 4096
    path: str | None = None

    def __post_init__(self) -> None:
        _one_of("tokenizer", self.name, ("bpe", "gpt2", "word"))
        if self.name == "bpe":
            _at_least("tokenizer.vocab_size", self.vocab_size, 257)


@dataclass
class OptimConfig:
    """The optimiser and its schedule.

    Attributes:
        name: ``adamw``, or ``muon`` for the weight matrices with AdamW for everything else.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        weight_decay: decoupled weight decay of weight matrices (norms and biases have none).
        betas: decay of AdamW's first and second moment.
        eps: AdamW's denominator offset.
        momentum: Muon's momentum.
        second_moment: ``plane`` lets AdamW scale the planes of a complex parameter apart;
            ``modulus`` uses |g|^2 for both, so that a step keeps the direction of the gradient.
        schedule: ``cosine``, ``wsd`` (warm-up, stable, linear decay) or ``constant``.
        warmup: steps of linear warm-up.
        decay: fraction of the steps in which ``wsd`` decays.
        final_lr: learning rate at the last step as a fraction of the peak.
        clip: largest gradient norm; 0 switches clipping off.
        accumulation: micro-batches that one update is the mean of.
    """

    name: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    momentum: float = 0.95
    second_moment: str = "plane"
    schedule: str = "cosine"
    warmup: int = 50
    decay: float = 0.2
    final_lr: float = 0.1
    clip: float = 1.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        _one_of("optim", self.name, ("adamw", "muon"))
        _positive("optim.lr", self.lr)
        _positive("optim.muon_lr", self.muon_lr)
        _at_least("optim.weight_decay", self.weight_decay, 0)
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas={self.betas} must hold two numbers")
        for beta in self.betas:
            _fraction("optim.betas", beta)
        _positive("optim.eps", self.eps)
        _fraction("optim.momentum", self.momentum)
        _one_of("optim.second_moment", self.second_moment, ("plane", "modulus"))
        _one_of("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        _at_least("optim.warmup", self.warmup, 0)
        _fraction("optim.decay", self.decay)
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"optim.final_lr={self.final_lr} is a fraction between 0 and 1")
        _at_least("optim.clip", self.clip, 0)
        _at_least("optim.accumulation", self.accumulation, 1)


@dataclass
class HardwareConfig:
    """The device and how it is used.

    Attributes:
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        memory_gb: cap of the CUDA allocator in GB (10^9 bytes); null for none.
        threads: CPU threads of PyTorch; null for PyTorch's own choice.
        compile: whether the model is compiled with ``torch.compile``.
        kernels: ``auto`` (Triton on a GPU) or ``eager`` (plain PyTorch everywhere).
        parallel: what joins the processes that torchrun started: ``ddp`` (each holds the model) or ``fsdp``
            (parameters, gradients and optimiser state are sharded); ``none`` for one process.
    """

    device: str = "auto"
    memory_gb: float | None = None
    threads: int | None = None
    compile: bool = False
    kernels: str = "auto"
    parallel: str = "none"

    def __post_init__(self) -> None:
        _one_of("hardware.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("hardware.kernels", self.kernels, ("auto", "eager"))
        _one_of("hardware.parallel", self.parallel, ("none", "ddp", "fsdp"))
        if self.memory_gb is not None:
            _positive("hardware.memory_gb", self.memory_gb)
        if self.threads is not None:
            _at_least("hardware.threads", self.threads, 1)


@dataclass
class LoggerConfig:
    """Where metrics go beside ``metrics.jsonl``, which is always written.

    Attributes:
        mode: W&B's ``offline``, ``online`` or ``disabled``.
        project: W&B project.
        entity: W&B user or team; null for the account's own.
        group: W&B group; null for that of the run that is continued, the folder of a sweep, or otherwise
            stage and model.
        tags: W&B tags beside stage, model and data.
        log_every: optimiser steps between two lines of metrics.
    """

    mode: str = "offline"
    project: str = "muse"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every: int = 10

    def __post_init__(self) -> None:
        _one_of("logger.mode", self.mode, ("offline", "online", "disabled"))
        # W&B refuses longer ones, and then the whole run.
        for option, text, longest in (
            *(("logger.tags", tag, 64) for tag in self.tags),
            *([("logger.group", self.group, 128)] if self.group is not None else []),
        ):
            if not 1 <= len(text) <= longest:
                raise ConfigError(f"{option}={text} must have between 1 and {longest} characters")
        _at_least("logger.log_every", self.log_every, 1)


@dataclass
class TrainConfig:
    """How long to train and how often to look.

    Attributes:
        steps: optimiser steps.
        batch_size: windows in a micro-batch.
        eval_every: steps between two evaluations on the validation split, the last step has one, too; 0 for
            none. The whole split is evaluated at the end in any case.
        eval_tokens: validation tokens of such an evaluation, in windows spread evenly over the split, the
            same ones each time; 0 for all.
        eval_stride: tokens that the window moves by in an evaluation; null for no overlap.
        test: whether the test split is evaluated at the end.
        checkpoint_every: steps between two checkpoints; 0 for the end only.
        async_checkpoint: whether checkpoints are copied and then written while training goes on.
        sample_tokens: length of the text sample printed at the end.
    """

    steps: int = 800
    batch_size: int = 16
    eval_every: int = 200
    eval_tokens: int = 65536
    eval_stride: int | None = None
    test: bool = False
    checkpoint_every: int = 200
    async_checkpoint: bool = False
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _at_least("train.steps", self.steps, 1)
        _at_least("train.batch_size", self.batch_size, 1)
        for name in ("eval_every", "eval_tokens", "checkpoint_every", "sample_tokens"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.eval_stride is not None:
            _at_least("train.eval_stride", self.eval_stride, 1)


BENCHMARKS = (
    "perplexity",
    "vram",
    "throughput",
    "stability",
    "gradients",
    "energy",
    "adjoint",
    "speedup",
    "kernels",
    "all",
)
KERNEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchmarkConfig:
    """What is measured and against what.

    Attributes:
        name: which benchmark; ``all`` runs every one that is about the stage, so not ``kernels`` and not
            ``adjoint``, which compares with torchdiffeq. Stage 3a has ``speedup`` only.
        batch_size: windows in a measured batch; null for the benchmark's own (muse/benchmarks/setting.py).
        seq_len: tokens in a measured window; null for the benchmark's own.
        train_steps: steps that both models are trained for when no checkpoint is given; 0 for none.
            ``speedup`` takes at least ``optim.accumulation``.
        checkpoint: run folder, or exported file, of the model under test; stage, model, data and tokenizer
            are those that it was trained with.
        baseline_checkpoint: run folder, or exported file, of the baseline, trained on the same text.
        warmup: untimed steps.
        repeats: timed steps.
        inputs: random inputs of the stability benchmark.
        rerun: whether a sweep measures again what a finished cell has already measured.
        dtypes: of the kernels: ``float32``, ``bfloat16``, ``float16``.
        width: complex channels of the kernels' inputs; null for ``model.complex.d_model``.
        heads: attention heads; null for ``model.complex.heads``.
        head_dim: complex channels of a head; null for as many as in the model.
        hidden: output channels of the linear product and hidden channels of the symplectic flow; null for
            ``model.complex.d_ff``.
        ode_steps: steps of the flow, in place of the stage's; null for the benchmark's own. ``stability`` and
            ``gradients`` have the flow of the stage, and so has the perplexity of a checkpoint.
        dt: size of a step of the flow, likewise.
        integrator: splitting scheme of the flow, likewise.
        compile: whether torch.compile is one of the kernels' alternatives.
        ablation: whether ``speedup`` trains with each part of the stack alone and left out, too.
    """

    name: str = "all"
    batch_size: int | None = None
    seq_len: int | None = None
    train_steps: int = 20
    checkpoint: str | None = None
    baseline_checkpoint: str | None = None
    warmup: int = 2
    repeats: int = 7
    inputs: int = 100
    rerun: bool = False
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    width: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    ode_steps: int | None = None
    dt: float | None = None
    integrator: str | None = None
    compile: bool = True
    ablation: bool = False

    def __post_init__(self) -> None:
        _one_of("benchmark", self.name, BENCHMARKS)
        if not self.dtypes:
            raise ConfigError(f"benchmark.dtypes={self.dtypes} must hold one of {', '.join(KERNEL_DTYPES)}")
        for dtype in self.dtypes:
            _one_of("benchmark.dtypes", dtype, KERNEL_DTYPES)
        if self.dt is not None:
            _positive("benchmark.dt", self.dt)
        if self.integrator is not None:
            _one_of("benchmark.integrator", self.integrator, INTEGRATORS)
        for name in ("width", "heads", "head_dim", "hidden", "batch_size", "seq_len", "ode_steps"):
            if getattr(self, name) is not None:
                _at_least(f"benchmark.{name}", getattr(self, name), 1)
        for name in ("repeats", "inputs"):
            _at_least(f"benchmark.{name}", getattr(self, name), 1)
        for name in ("train_steps", "warmup"):
            _at_least(f"benchmark.{name}", getattr(self, name), 0)


@dataclass
class StackConfig:
    """The optimisation stack of stage 3a, whose parts can be switched off.

    Attributes:
        level: of KernelOptimizer: 0 none, 1 fused operations and threads, 2 bf16 products, too, 3
            compilation, too; what does not pay on this machine is left off.
        compression: of SemanticCompressor: ``auto`` (where the step would not fit ``memory_mb`` without it),
            ``on`` or ``off``.
        ratio: what compressed activations may take, as a fraction of their float32 size.
        memory_mb: peak memory of a training step that is allowed, in MB (10^6 bytes).
        speculation: whether InferenceScalingEngine decodes the samples.
        speculation_warmup: passes in which it gathers statistics.
    """

    level: int = 3
    compression: str = "auto"
    ratio: float = 0.3
    memory_mb: float = 500.0
    speculation: bool = True
    speculation_warmup: int = 100

    def __post_init__(self) -> None:
        _one_of("stack.level", str(self.level), ("0", "1", "2", "3"))
        _one_of("stack.compression", self.compression, ("auto", "on", "off"))
        if not 0.251 <= self.ratio <= 0.5:
            raise ConfigError(
                f"stack.ratio={self.ratio} is not possible; activations in eight bits take between 0.251 and "
                "0.5 of float32"
            )
        _positive("stack.memory_mb", self.memory_mb)
        _at_least("stack.speculation_warmup", self.speculation_warmup, 0)


@dataclass
class RunConfig:
    """Everything ``train.py`` needs.

    Attributes:
        seed: seed of initialisation, data order and dropout.
        resume: ``never``, ``auto`` (continue the newest run of the same options, or take its results) or the
            folder of a run, whose options are taken where none is given; how it goes on may change.
        output_root: folder in which runs are written and looked for.
        profile: whether the first steps are profiled (``train.py`` only); see docs/profiling.md.
    """

    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    resume: str = "never"
    output_root: str = "outputs"
    profile: bool = False

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        stride = self.train.eval_stride
        if stride is not None and stride > self.model.seq_len:
            raise ConfigError(
                f"train.eval_stride={stride} skips tokens; it must be at most "
                f"model.seq_len={self.model.seq_len}"
            )
        if self.hardware.parallel == "fsdp":
            self._check_sharded()

    def _check_sharded(self) -> None:
        for option, value, refused, instead in (
            ("optim", self.optim.name, "muon", "optim=adamw"),
            ("stage.precision", self.stage.precision, "fp16-mixed", "bf16-mixed"),
            ("hardware.compile", self.hardware.compile, True, "hardware.compile=false"),
        ):
            if value == refused:
                raise ConfigError(
                    f"{option}={str(value).lower()} does not go with hardware.parallel=fsdp; choose "
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
