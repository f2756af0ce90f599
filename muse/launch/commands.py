"""The commands ``train.py`` and ``bench.py``, which an installed package has as muse-train and muse-bench."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from muse.config import CONF
from muse.launch.cli import run_job, start
from muse.launch.train import run_train, validation_loss


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _train(composed: DictConfig) -> float:
    run_job(composed, run_train)
    # For a sweeper that searches.
    return validation_loss()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="bench")
def _bench(composed: DictConfig) -> None:
    # What is only shown or refused does not need torch.
    from muse.launch.bench import run_benchmark

    run_job(composed, run_benchmark)


def train() -> None:
    """Train a language model as the command line says, and exit."""
    start(_train)


def bench() -> None:
    """Measure a language model as the command line says, and exit."""
    start(_bench)
