"""Very small runs of the training loop, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muse.config import RunConfig
from muse.data import TokenData
from muse.models import LanguageModel
from muse.runs.checkpoints import load_state
from muse.training import trainer
from support import configs
from support.configs import stage_config, token_data


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


def run_config(
    number: int = 1, precision: str = "fp32", optim: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    return configs.run_config(stage_config(number, precision, dropout=0.2), optim, **train)


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
    resumed = (resume_from, load_state(resume_from)) if resume_from is not None else None
    return trainer.train(config, data, torch.device("cpu"), run, log, resumed, wandb_id, progress=False)


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


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)
