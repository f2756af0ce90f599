"""Perplexity of a model and of the real baseline on the same text."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from muse.benchmarks.model import benchmark_model
from muse.benchmarks.workload import batch_shape, flow_of
from muse.config import BenchConfig
from muse.data import TokenData, load_tokens
from muse.errors import ConfigError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel, build_model, count_parameters
from muse.training.evaluate import Evaluation, evaluate
from muse.training.trainer import train


def measure_perplexity(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Evaluate a model on the validation split: a checkpoint's, or one trained here.

    Without ``benchmark.checkpoint`` the model is trained for ``benchmark.train_steps`` steps; a baseline
    measured with the same configuration sees the same tokens in the same order.

    Returns:
        ``ppl``, ``loss``, ``word_ppl``, ``bits_per_byte`` and ``tokens`` of the evaluation,
        ``word_ppl_reason`` where there is no perplexity per word, ``trained``, which says how the weights
        came about, ``parameters``, their number, and ``curve``, the training loss of each step, no mean over
        some.

    Raises:
        ConfigError: for data without text.
    """
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=perplexity needs text; choose data=stdlib, wikitext2 or text")
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=data.vocab_size))
    curve: list[tuple[int, float]] = []
    if config.benchmark.checkpoint is not None or config.benchmark.train_steps == 0:
        checkpoint = config.benchmark.checkpoint
        valid = _evaluate(config, data, device)
        trained = f"checkpoint {checkpoint}" if checkpoint else "untrained"
    else:
        with tempfile.TemporaryDirectory() as folder:
            _, valid = train_briefly(config, data, device, Path(folder), curve)
        trained = f"{config.benchmark.train_steps} steps in this run"
    parameters = count_parameters(build_model(config.stage, config.model, data.vocab_size))
    figures = dataclasses.asdict(valid)
    if valid.word_ppl_reason is None:
        del figures["word_ppl_reason"]
    return {
        **flow_of(config),
        **figures,
        "trained": trained,
        "parameters": parameters,
        "curve": curve,
    }


def _evaluate(config: BenchConfig, data: TokenData, device: torch.device) -> Evaluation:
    batch, length = batch_shape(config)
    return evaluate(
        benchmark_model(config, device),
        data.valid,
        data.counts.get("valid"),
        length,
        batch,
        config.train.eval_stride,
        0,
        autocast_dtype(config.stage.precision),
    )


def train_briefly(
    config: BenchConfig, data: TokenData, device: torch.device, folder: Path, curve: list[tuple[int, float]]
) -> tuple[LanguageModel, Evaluation]:
    """Train for ``benchmark.train_steps`` steps and evaluate; the checkpoint goes into ``folder``.

    Raises:
        KeyboardInterrupt: when the training was interrupted.
    """
    batch, length = batch_shape(config)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=config.benchmark.train_steps,
            batch_size=batch,
            eval_every=0,
            checkpoint_every=0,
        ),
        model=dataclasses.replace(config.model, seq_len=length),
        logger=dataclasses.replace(config.logger, log_every=1),
    )

    def log(step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            curve.append((step, metrics["train/loss"]))

    model, result = train(config, data, device, folder, log)
    if result.valid is None:
        raise KeyboardInterrupt
    return model, result.valid
