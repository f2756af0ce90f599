"""The model that a benchmark measures: built, loaded or briefly trained, and a step of its training."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.data import TokenData
from muse.models import LanguageModel, build_model
from muse.options import changed
from muse.runs.checkpoints import find_weights, load_weights
from muse.training.evaluate import Evaluation
from muse.training.optim import ModelOptimizer
from muse.training.step import TakenStep, TrainingStep, training_step
from muse.training.trainer import Log, train


def random_tokens(config: BenchConfig, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Uniformly random inputs and targets, int64 (benchmark.batch_size, benchmark.seq_len)."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = batch_shape(config)
    tokens = torch.randint(config.model.vocab_size, (batch, length + 1), generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def benchmark_model(config: BenchConfig, device: torch.device) -> LanguageModel:
    """The model of a benchmark, with the weights of ``benchmark.checkpoint`` if one is given."""
    model = build_model(config.stage, config.model, config.model.vocab_size, config.seed)
    if config.benchmark.checkpoint is not None:
        place = Path(config.benchmark.checkpoint)
        load_weights(find_weights(place) or place, model)
    model.to(device)
    if config.hardware.compile:
        model.compile_features()
    return model


def random_training_step(
    config: BenchConfig, model: LanguageModel, device: torch.device
) -> tuple[TrainingStep[ModelOptimizer], Callable[[], TakenStep]]:
    """The step that trains a model, and a function that takes one on random tokens."""
    step = training_step(config, model)
    batch = random_tokens(config, device)
    model.train()
    numbers = itertools.count()

    def take() -> TakenStep:
        return step.take(next(numbers), [batch])

    return step, take


def train_briefly(
    config: BenchConfig,
    data: TokenData,
    device: torch.device,
    folder: Path,
    curve: list[tuple[int, float]],
    eval_every: int = 0,
    note: Log | None = None,
) -> tuple[LanguageModel, Evaluation]:
    """Train for ``benchmark.train_steps`` steps and evaluate; the checkpoint goes into ``folder``.

    Args:
        config: what to train.
        data: to train and evaluate with.
        device: of the model.
        folder: of the run.
        curve: is given the training loss of each step.
        eval_every: steps between evaluations on the way; 0 for none.
        note: called with every line of metrics.

    Raises:
        KeyboardInterrupt: when the training was interrupted.
    """
    batch, length = batch_shape(config)
    steps = config.benchmark.train_steps
    config = changed(
        config,
        train={"steps": steps, "batch_size": batch, "eval_every": eval_every, "checkpoint_every": 0},
        model={"seq_len": length},
        logger={"log_every": 1},
    )

    def log(step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            curve.append((step, metrics["train/loss"]))
        if note is not None:
            note(step, metrics)

    model, result = train(config, data, device, folder, log)
    if result.valid is None:
        raise KeyboardInterrupt
    return model, result.valid
