"""The options of a training: optimiser, hardware, logging, and what else a run does."""

from __future__ import annotations

from dataclasses import dataclass

from muse.errors import ConfigError
from muse.options import check_options, option


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
