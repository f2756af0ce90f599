"""The models of the benchmarks, and the step of training whose memory and speed they measure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from muse.benchmarks.checkpoint import as_trained
from muse.benchmarks.workload import batch_shape
from muse.config import CONF, BenchConfig, StageConfig
from muse.models import LanguageModel, build_model
from muse.runs.checkpoints import find_checkpoint, load_weights
from muse.training.step import TrainingStep


def baseline_of(config: BenchConfig, precision: str | None = None, stage_number: str = "0") -> BenchConfig:
    """The same benchmark of the real baseline or of stage 1, in its own precision or the given one.

    ``benchmark.baseline_checkpoint`` is of stage 0, and where stage 2 is measured of stage 1. It is measured
    as the model that was trained.
    """
    options = OmegaConf.load(CONF / "stage" / f"{stage_number}.yaml")
    stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StageConfig), options))
    assert isinstance(stage, StageConfig)
    if precision is not None:
        stage = dataclasses.replace(stage, precision=precision)
    stage = dataclasses.replace(stage, dropout=config.stage.dropout, tied=config.stage.tied)
    given = (
        config.benchmark.baseline_checkpoint
        if stage_number == ("1" if config.stage.number == "2" else "0")
        else None
    )
    benchmark = dataclasses.replace(config.benchmark, checkpoint=given)
    baseline = dataclasses.replace(config, stage=stage, benchmark=benchmark)
    return as_trained(baseline, given) if given is not None else baseline


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
        checkpoint = find_checkpoint(Path(config.benchmark.checkpoint), "best")
        load_weights(checkpoint or Path(config.benchmark.checkpoint), model)
    model.to(device)
    if config.hardware.compile:
        model.compile_features()
    return model


def training_step(
    config: BenchConfig, model: LanguageModel, device: torch.device
) -> tuple[TrainingStep, Callable[[], float]]:
    """The step that trains a model, and a function that takes one on random tokens and returns its loss."""
    step = TrainingStep(model, config.optim, config.hardware, config.stage.precision, config.seed)
    batch = random_tokens(config, device)
    model.train()
    numbers = itertools.count()

    def take() -> float:
        loss = step.gradients([batch])
        step.update(next(numbers), loss)
        return loss

    return step, take
