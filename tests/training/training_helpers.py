"""Very small runs of the training loop, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from muse.config import (
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    WidthConfig,
)
from muse.data import Counts, TokenData
from muse.models import LanguageModel
from muse.runs.checkpoints import load_state, load_tensors, stored_tensors
from muse.training import trainer

VOCAB = 13
SEQ_LEN = 8
# 20 training windows, so an epoch has 19 (see training_batch): ten batches of two reach the second one.
TRAIN_TOKENS = 20 * SEQ_LEN + 5


class CrashError(Exception):
    """Stands for the end of a process."""


@dataclass
class Recorder:
    """A log that keeps what it is given and can act on a step."""

    lines: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    react: Callable[[int], None] | None = None

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))
        if self.react is not None:
            self.react(step)

    def losses(self) -> dict[int, float]:
        """Training losses by step."""
        return {step: metrics["train/loss"] for step, metrics in self.lines if "train/loss" in metrics}


def stage_config(number: int, precision: str = "fp32", **options: Any) -> StageConfig:
    activation = "gelu" if number == 0 else "split_gelu"
    return StageConfig(**{"number": str(number), "precision": precision, "activation": activation, **options})


def run_config(
    number: int = 1, precision: str = "fp32", optim: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """A run of a model with some thousand parameters; every step is logged."""
    width = WidthConfig(d_model=8, layers=2, heads=2, kv_heads=1, d_ff=16)
    defaults = {"steps": 6, "batch_size": 2, "eval_every": 0, "checkpoint_every": 0, "sample_tokens": 0}
    return RunConfig(
        stage=stage_config(number, precision, dropout=0.2),
        model=ModelConfig("nano", VOCAB, SEQ_LEN, real=width, complex=width),
        data=DataConfig(name="stdlib"),
        tokenizer=TokenizerConfig(name="word"),
        optim=OptimConfig(**{"lr": 0.02, "warmup": 2, **(optim or {})}),
        hardware=HardwareConfig(device="cpu"),
        logger=LoggerConfig(mode="disabled", log_every=1),
        train=TrainConfig(**{**defaults, **train}),
    )


def token_data(train_tokens: int = TRAIN_TOKENS, valid_tokens: int = 61) -> TokenData:
    """Tokens of a noisy cycle, so that there is something to learn."""
    generator = np.random.default_rng(0)

    def split(size: int) -> np.ndarray:
        return ((np.arange(size) * 5 + generator.integers(2, size=size)) % VOCAB).astype(np.uint16)

    tokens = {"train": split(train_tokens), "valid": split(valid_tokens), "test": split(40)}
    counts = {name: Counts(len(values), len(values) // 3, 2 * len(values)) for name, values in tokens.items()}
    return TokenData(**tokens, vocab_size=VOCAB, tokenizer=None, counts=counts)


def run_train(
    config: RunConfig,
    run: Path,
    log: Callable[[int, dict[str, float]], None] | None = None,
    resume_from: Path | None = None,
    data: TokenData | None = None,
    wandb_id: str | None = None,
) -> tuple[LanguageModel, trainer.TrainResult]:
    log = log if log is not None else Recorder()
    data = data if data is not None else token_data()
    return trainer.train(config, data, torch.device("cpu"), run, log, resume_from, wandb_id, progress=False)


def crash_at(step: int) -> Callable[[int], None]:
    def react(reached: int) -> None:
        if reached == step:
            raise CrashError

    return react


def prepare_model(monkeypatch: Any, prepare: Callable[[LanguageModel], None]) -> list[LanguageModel]:
    """Let ``prepare`` change the model of the next run; the list receives that model."""
    built: list[LanguageModel] = []
    build = trainer.build_model

    def build_and_prepare(*arguments: Any) -> LanguageModel:
        model = build(*arguments)
        prepare(model)
        built.append(model)
        return model

    monkeypatch.setattr(trainer, "build_model", build_and_prepare)
    return built


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(first: Any, second: Any) -> bool:
    """Equality to the last bit through dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        alike = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return alike and first.shape == second.shape and torch.equal(bits(first), bits(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def stored(checkpoint: Path, *groups: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of some of its groups, by their names in it."""
    tensors = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in stored_tensors(checkpoint).items()
        if not groups or name.startswith(tuple(f"{group}." for group in groups))
    }
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        nested.setdefault(group, {})[rest] = tensor
    load_tensors(checkpoint, nested)
    return tensors


def contents(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything in a checkpoint: its tensors and the rest of the state."""
    return stored(checkpoint), vars(load_state(checkpoint))


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
