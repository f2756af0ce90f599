"""The options of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from muse.config.folder import CONF
from muse.config.stage import INTEGRATORS
from muse.options import check_options, option

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
